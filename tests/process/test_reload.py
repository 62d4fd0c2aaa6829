"""SIGHUP to `bear serve`: the settings are read again, and a terminal that is closed ends it."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bear_grpc.v1 import server_service_pb2 as server_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.processes import BEAR, RunningServer
from tests.helpers.rpc import WAIT_S, collect, eventually, kinds, read_until

ROOT = str(Path(__file__).parents[2])
FILE = "max_waiting_requests = {count}\nlog_level = {level}\n{more}\n"


async def logged(server: RunningServer, part: str) -> str:
    """Waits for the first line of the log that has `part` in it."""

    async def found() -> str:
        return next((line for line in server.lines if part in line), "")

    return await eventually(found)


async def max_waiting(server: RunningServer) -> int:
    info = await server.api.server.GetServerInfo(server_pb.GetServerInfoRequest())
    return info.limits.max_waiting_requests


async def test_a_hangup_takes_over_what_can_be_and_breaks_no_stream(
    tmp_path: Path, steady_file: Path
) -> None:
    file = tmp_path / "bear.toml"
    file.write_text(FILE.format(count=5, level='"INFO"', more=""))
    async with RunningServer(tmp_path, "--config", str(file), environ={"BEAR_MAX_PULLS": "3"}) as server:
        await server.ready()
        assert await max_waiting(server) == 5
        await server.api.register("steady", steady_file, load_options=pb.LoadOptions(threads=1))
        stream = server.api.generate("steady", max_tokens=200, ignore_eos=True)
        await read_until(stream, "delta")
        file.write_text(
            FILE.format(count=6, level='"DEBUG"', more="max_pulls = 9\nheartbeat_timeout_s = 20.0")
        )
        server.terminate(signal.SIGHUP)
        line = await logged(server, "reloaded: ")
        # The variable comes before the file, as at the start: max_pulls has not changed.
        assert line.endswith(
            "reloaded: max_waiting_requests, log_level; needs a restart: heartbeat_timeout_s"
        )
        assert await max_waiting(server) == 6
        assert kinds(await collect(stream))[-1] == "completed"
        file.write_text(FILE.format(count=7, level="5", more="no_such = 1"))
        server.terminate(signal.SIGHUP)
        line = await logged(server, "nothing is reloaded")
        assert f"{file}:2: log_level: expected `str`, got `int`" in line
        assert f"{file}:3: there is no setting 'no_such'" in line
        assert " ERROR " in line
        assert await max_waiting(server) == 6
        server.terminate()
        assert await server.ended() == 0


def hung_up(moment: str) -> tuple[str, ...]:
    """A server that this is a wrapper of gets a SIGHUP at this moment; see the module."""
    return (sys.executable, "-m", "tests.helpers.hangups", moment)


@pytest.mark.parametrize("moment", ["imports", "models"])
async def test_a_hangup_during_the_start_reloads_after_it(tmp_path: Path, moment: str) -> None:
    """It ended the process, or the start when what it had read was read a second time."""
    wrapper, environ = hung_up(moment), {"PYTHONPATH": ROOT}
    async with RunningServer(tmp_path, wrapper=wrapper, environ=environ) as server:
        await server.ready()
        await logged(server, "reloaded: nothing has changed")
        server.terminate()
        assert await server.ended() == 0
        assert server.errors() == []


class Terminal:
    """A process with a terminal of its own, which can be closed."""

    def __init__(self, *command: str) -> None:
        self._main, side = pty.openpty()
        # The session's leader gets the terminal by opening it.
        start = (
            "import os, signal, sys; os.setsid(); os.open(os.ttyname(0), os.O_RDWR); "
            # Who runs the tests may have ignored it, as nohup does.
            "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *command],
            env={**os.environ, "PYTHONPATH": ROOT},
            stdin=side,
            stdout=side,
            stderr=side,
        )
        os.close(side)

    async def shows(self, part: bytes) -> None:
        """Waits until this has been written to it."""
        seen = b""
        async with asyncio.timeout(WAIT_S):
            while part not in seen:
                seen += await asyncio.to_thread(os.read, self._main, 4096)

    def close(self) -> None:
        if self._main >= 0:
            os.close(self._main)
        self._main = -1

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, WAIT_S / 2)


@asynccontextmanager
async def terminal(folder: Path, wrapper: Sequence[str] = ()) -> AsyncIterator[Terminal]:
    """A server that was started from one."""
    given = ("--listen", f"unix:{folder}/bear.sock", "--models-dir", f"{folder}/m")
    started = await asyncio.to_thread(Terminal, *wrapper, *BEAR, "serve", *given)
    try:
        yield started
    finally:
        started.close()
        started.process.kill()
        started.process.wait()


async def test_a_closed_terminal_ends_the_server(tmp_path: Path) -> None:
    """Whoever closes the window of `make serve` leaves nothing behind."""
    async with terminal(tmp_path) as window:
        await window.shows(b"serves on")
        window.close()
        assert await window.ended() == 0


async def test_a_terminal_that_is_closed_during_the_start_ends_it(tmp_path: Path) -> None:
    async with terminal(tmp_path, hung_up("closed")) as window:
        await window.shows(b"imports")
        window.close()
        assert await window.ended() == -signal.SIGHUP
