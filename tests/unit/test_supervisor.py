"""A worker that no signal ends, as one that hangs in a driver: it is given up, and not forgotten."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from bear_grpc import suspects
from bear_grpc.executor import link, probe, process
from bear_grpc.executor.confinement import Confinement
from bear_grpc.executor.crash import CrashReport
from bear_grpc.executor.process import NOT_ENDED, WorkerProcess
from bear_grpc.executor.share import CpuShare
from bear_grpc.executor.supervisor import Supervisor
from bear_grpc.framing import encode
from bear_grpc.protocol import Load, Ready
from bear_grpc.types import LoadOptions, SandboxMode
from tests.helpers.lifecycle import INFO
from tests.helpers.rpc import eventually

NO_PID = 2**22 + 7
"""More than Linux gives: signals reach nobody."""


class StubbornPopen:
    """A process that holds its ends of socket and pipe until it is told to end."""

    def __init__(self) -> None:
        self.pid = NO_PID
        out, self._pipe = os.pipe()
        self.stderr = os.fdopen(out, "rb")
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return self.code

    def end(self) -> None:
        self.code = -9
        os.close(self._pipe)


class OneWorker:
    """A spawner that gives one worker, which is that process."""

    def __init__(self) -> None:
        self.popen = StubbornPopen()
        ours, self.peer = socket.socketpair()
        page_fd = suspects.create()
        page = suspects.SuspectsPage(page_fd)
        os.close(page_fd)
        popen: Any = self.popen
        self.process = WorkerProcess(popen, ours, page, Confinement(SandboxMode.OFF))

    def order(self) -> concurrent.futures.Future[WorkerProcess]:
        future: concurrent.futures.Future[WorkerProcess] = concurrent.futures.Future()
        future.set_result(self.process)
        return future


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneWorker]:
    for name in ("EXIT_GRACE_S", "CLOSE_S", "LAST_LINES_S"):
        monkeypatch.setattr(link, name, 0.01)
    made = OneWorker()
    yield made
    if made.popen.code is None:
        made.popen.end()
    made.peer.close()


def supervisor_of(worker: OneWorker, ends: list[CrashReport]) -> Supervisor:
    spawner: Any = worker
    return Supervisor(
        "m",
        spawner=spawner,
        share=CpuShare(),
        heartbeat_timeout_s=10.0,
        startup_timeout_s=10.0,
        on_frame=lambda frame: None,
        on_end=ends.append,
    )


async def test_an_unload_of_a_worker_that_does_not_end_ends_and_tells(
    worker: OneWorker, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[CrashReport] = []
    supervisor = supervisor_of(worker, ends)
    worker.peer.sendall(encode(Ready(INFO, LoadOptions(), 0, 0)))
    await supervisor.start(Load("m", "m.gguf", LoadOptions(), 1))
    async with asyncio.timeout(10):
        await supervisor.stop()
    assert (supervisor.pid, supervisor.left) == (0, (worker.process,))
    assert [report.how for report in ends] == [NOT_ENDED]
    assert not ends[0].is_native_fault
    assert f"process {NO_PID} does not end" in caplog.text
    worker.popen.end()
    assert supervisor.left == ()


async def test_a_cancelled_load_does_not_wait_for_a_worker_that_does_not_end(
    worker: OneWorker,
) -> None:
    supervisor = supervisor_of(worker, [])
    start = asyncio.ensure_future(supervisor.start(Load("m", "m.gguf", LoadOptions(), 1)))

    async def started() -> bool:
        return supervisor.pid != 0

    await eventually(started)
    start.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([start])
    assert start.cancelled()
    assert supervisor.left == (worker.process,)


async def test_a_probe_that_does_not_end_ends_for_who_asked(
    worker: OneWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_TIMEOUT_S", 0.01)
    spawner: Any = worker
    with pytest.raises(probe.BackendError, match="took more than"):
        async with asyncio.timeout(10):
            await probe.probe(spawner)


def test_a_process_tells_whether_it_is_stopped_or_left(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "60"], stderr=subprocess.PIPE, process_group=0)
    ours, theirs = socket.socketpair()
    page_fd = suspects.create()
    with ours, theirs, child.stderr:  # type: ignore[union-attr]
        held = WorkerProcess(child, ours, suspects.SuspectsPage(page_fd), Confinement(SandboxMode.OFF))
        os.close(page_fd)
        assert not held.has_ended
        assert held.left_bytes() > 0
        assert not held.is_stopped
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert held.is_stopped
        monkeypatch.setattr(process, "KILL_GRACE_S", 10.0)
        assert held.wait(0.0) == "SIGKILL"
        assert held.has_ended
        assert held.left_bytes() == 0
        held.suspects()
