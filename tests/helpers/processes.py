"""`bear serve` as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from grpc_health.v1 import health_pb2

from tests.helpers.rpc import WAIT_S, Api, eventually

BEAR = (sys.executable, "-m", "bear_grpc.cli")
# A server that is not there yet is tried again soon.
RECONNECT = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
SERVING = health_pb2.HealthCheckResponse.SERVING


class RunningServer:
    """Starts `bear serve` on a socket in `folder`; ends it, however the body ends."""

    def __init__(
        self,
        folder: Path,
        *args: str,
        name: str = "bear",
        wrapper: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`wrapper` is what the command is given to; it must exec it."""
        self.target = f"unix:{folder}/{name}.sock"
        given = (
            "--models-dir",
            f"{folder}/models",
            "--state-dir",
            f"{folder}/state",
            "--allow-path",
            str(folder),
        )
        self._command = (*wrapper, *BEAR, "serve", "--listen", self.target, *given, *args)
        own = {"BEAR_STATE_DIR": str(folder / "state"), "BEAR_LOG_FORMAT": "text"}
        self._environ = {**os.environ, **own, **(environ or {})}
        self.lines: list[str] = []
        self.api = Api(self.target, list(RECONNECT))

    async def __aenter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self._command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.api.channel.close()
        self.process.kill()
        await self.ended()

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ready(self) -> Self:
        """Waits until health says SERVING; fails if the process ends before."""
        watching = asyncio.create_task(self._serving())
        # Without a bound: it goes on beside the test, and the process is killed after that.
        ending = asyncio.create_task(asyncio.to_thread(self.process.wait))
        done, _ = await asyncio.wait({watching, ending}, return_when=asyncio.FIRST_COMPLETED, timeout=WAIT_S)
        if watching not in done:
            watching.cancel()
            self.process.kill()
            await ending
            raise AssertionError("\n".join(["the server is not ready", *self.lines]))
        return self

    async def ended(self) -> int:
        """Waits until the process has ended and all of its stderr has been read; gives the exit code."""
        code = await asyncio.to_thread(self._wait)
        await asyncio.to_thread(self._reader.join)
        return code

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def socket_exists(self) -> bool:
        return Path(self.target.removeprefix("unix:")).exists()

    def errors(self) -> list[str]:
        """The lines of its log that are errors."""
        return [line for line in self.lines if " ERROR " in line]

    async def _serving(self) -> None:
        watch = self.api.health.Watch(health_pb2.HealthCheckRequest(service=""), wait_for_ready=True)
        while (await watch.read()).status != SERVING:
            pass
        watch.cancel()

    def _wait(self) -> int:
        return self.process.wait(10 * WAIT_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self.lines.append(line.decode(errors="replace").rstrip())


async def gone(pid: int) -> None:
    """Waits until a process has ended. An orphan may stay as a zombie: nobody reaps it in a container."""

    async def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    await eventually(ended)
