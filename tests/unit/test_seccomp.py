"""The filter as a program: what it answers on both machines, by a reader of BPF that is ours."""

from __future__ import annotations

import errno

import pytest

from bear_grpc.worker import landlock, syscalls
from bear_grpc.worker.seccomp import program

PID = 4242
ARCHITECTURES = {syscalls.X86_64: 0xC000003E, syscalls.AARCH64: 0xC00000B7}
MACHINES = pytest.mark.parametrize("machine", ARCHITECTURES)
ALLOWED = 0
CLONE_THREAD, PTHREAD_FLAGS, FORK_FLAGS = 0x10000, 0x3D0F00, 0x1200011
# Of each machine: calls that a worker lives by.
NEEDED = {
    syscalls.X86_64: {"read": 0, "mmap": 9, "sendto": 44, "recvfrom": 45, "futex": 202, "openat": 257},
    syscalls.AARCH64: {"openat": 56, "read": 63, "futex": 98, "sendto": 206, "recvfrom": 207, "mmap": 222},
}


def answer(machine: str, number: int, first: int = 0, *, arch: int | None = None) -> int:
    """What a call gets: ALLOWED, or its errno."""
    fields = {0: number, 4: ARCHITECTURES[machine] if arch is None else arch, 16: first & 0xFFFFFFFF}
    instructions = program(machine, PID)
    place = value = 0
    while True:
        code, if_true, if_false, constant = instructions[place]
        place += 1
        if code == 0x20:
            value = fields[constant]
        elif code == 0x06:
            assert constant & 0xFFFF0000 in (0x7FFF0000, 0x00050000)
            return constant & 0xFFFF
        else:
            tests = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}
            place += if_true if tests[code] else if_false


@MACHINES
def test_what_a_worker_needs_is_allowed(machine):
    assert {name: answer(machine, number) for name, number in NEEDED[machine].items()} == dict.fromkeys(
        NEEDED[machine], ALLOWED
    )


@MACHINES
def test_every_call_of_the_list_is_denied(machine):
    assert {answer(machine, number) for number in syscalls.denied(machine)} == {errno.EPERM}


@MACHINES
def test_threads_may_start_and_processes_may_not(machine):
    clone, clone3 = (syscalls.judged(machine, name) for name in ("clone", "clone3"))
    assert answer(machine, clone, PTHREAD_FLAGS) == ALLOWED
    assert answer(machine, clone, FORK_FLAGS) == errno.EPERM
    assert answer(machine, clone3, CLONE_THREAD) == errno.ENOSYS


@MACHINES
@pytest.mark.parametrize("name", ["kill", "tgkill"])
def test_signals_go_to_the_process_itself_only(machine, name):
    number = syscalls.judged(machine, name)
    assert answer(machine, number, PID) == ALLOWED
    assert {answer(machine, number, pid) for pid in (0, 1, -1, PID + 1, -PID)} == {errno.EPERM}


@MACHINES
def test_limits_of_others_and_the_death_signal_are_out_of_reach(machine):
    limits, prctl = (syscalls.judged(machine, name) for name in ("prlimit64", "prctl"))
    assert [answer(machine, limits, pid) for pid in (0, PID, 1)] == [ALLOWED, ALLOWED, errno.EPERM]
    assert [answer(machine, prctl, option) for option in (15, 1)] == [ALLOWED, errno.EPERM]


@MACHINES
def test_calls_of_another_machine_are_denied(machine):
    other = next(arch for name, arch in ARCHITECTURES.items() if name != machine)
    read = NEEDED[machine]["read"]
    assert answer(machine, read, arch=other) == errno.EPERM
    assert answer(machine, read, arch=0x40000003) == errno.EPERM


def test_calls_of_x32_are_denied():
    assert answer(syscalls.X86_64, 0x40000000) == errno.EPERM


@MACHINES
def test_no_number_is_in_the_list_twice(machine):
    numbers = [*syscalls.denied(machine), *(syscalls.judged(machine, name) for name in syscalls.JUDGED)]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("abi", "expected"),
    [
        (1, (0x1FFF, 0, 0)),
        (2, (0x3FFF, 0, 0)),
        (3, (0x7FFF, 0, 0)),
        (4, (0x7FFF, 3, 0)),
        (5, (0xFFFF, 3, 0)),
        (6, (0xFFFF, 3, 3)),
        (7, (0xFFFF, 3, 3)),
        (9, (0xFFFF, 3, 3)),
    ],
)
def test_landlock_handles_what_each_kernel_knows(abi, expected):
    assert landlock.handled(abi) == expected
