"""A seccomp filter: system calls that a worker never needs answer EPERM.

A deny list, because the libraries below a worker may use any other call. What is
denied is in `syscalls`. The filter is a program of classic BPF over `struct seccomp_data`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform

from .landlock import Unavailable
from .syscalls import AARCH64, X86_64, denied, judged

_PR_SET_PDEATHSIG = 1
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000

# By machine: the number of the call `seccomp`, and AUDIT_ARCH_*.
_MACHINES = {X86_64: (317, 0xC000003E), AARCH64: (277, 0xC00000B7)}
_SET_MODE_FILTER = 1
# Without it older kernels slow the whole process down against speculation of its own code.
_SPEC_ALLOW = 1 << 2

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets; the low half of an argument is first on both machines

Instruction = tuple[int, int, int, int]


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def _load(offset: int) -> Instruction:
    return _LOAD, 0, 0, offset


def _answer(number: int) -> Instruction:
    return _RETURN, 0, 0, _ERRNO | number


_PERMIT: Instruction = (_RETURN, 0, 0, _ALLOW)
_REFUSE = _answer(errno.EPERM)


def _when(number: int, *then: Instruction) -> list[Instruction]:
    """`then` for the call of this number; it must end with an answer."""
    return [(_JUMP_EQUAL, 0, len(then), number), *then]


def _only_if_first_is(*values: int) -> list[Instruction]:
    """Permits when the first argument, as 32 bits, is one of the values."""
    tests: list[Instruction] = [(_JUMP_EQUAL, len(values) - place, 0, v) for place, v in enumerate(values)]
    return [_load(_FIRST_ARGUMENT), *tests, _REFUSE, _PERMIT]


def program(machine: str, pid: int) -> list[Instruction]:
    """The filter for a machine of `syscalls`, in a process with this id."""
    first = _load(_FIRST_ARGUMENT)
    number = functools.partial(judged, machine)
    found = [_load(_ARCH), (_JUMP_EQUAL, 1, 0, _MACHINES[machine][1]), _REFUSE, _load(_NUMBER)]
    if machine == X86_64:
        found += [(_JUMP_AT_LEAST, 0, 1, _X32), _REFUSE]
    found += _when(number("clone"), first, (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD), _REFUSE, _PERMIT)
    # Its flags lie in memory, where a filter cannot look: libc falls back to clone.
    found += _when(number("clone3"), _answer(errno.ENOSYS))
    # abort() and raise() send a signal to this very process.
    found += _when(number("kill"), *_only_if_first_is(pid))
    found += _when(number("tgkill"), *_only_if_first_is(pid))
    found += _when(number("prlimit64"), *_only_if_first_is(0, pid))
    # The kernel's promise that a worker ends with its server cannot be taken back.
    found += _when(number("prctl"), first, (_JUMP_EQUAL, 0, 1, _PR_SET_PDEATHSIG), _REFUSE, _PERMIT)
    for each in denied(machine):
        found += _when(each, _REFUSE)
    return [*found, _PERMIT]


def confine() -> None:
    """Puts the filter in force for this thread and those that it starts later.

    no_new_privs must be set. Raises Unavailable, with nothing denied.
    """
    machine = platform.machine()
    machine = {"arm64": AARCH64, "amd64": X86_64}.get(machine.lower(), machine)
    if machine not in _MACHINES:
        raise Unavailable(f"seccomp: no filter for {machine}")
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise Unavailable("seccomp: no filter for 32-bit programs")
    instructions = program(machine, os.getpid())
    array = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
    filtering = _Program(len(instructions), array)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    call = _MACHINES[machine][0]
    if libc.syscall(
        call, ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(_SPEC_ALLOW), ctypes.byref(filtering)
    ):
        raise Unavailable(f"seccomp: {os.strerror(ctypes.get_errno())}")
