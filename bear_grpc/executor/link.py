"""The connection to one worker: frames both ways, its stderr, its end."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
from collections.abc import Callable

from ..framing import FrameBuffer, FrameError, encode
from ..protocol import LEVEL_MARKS, Confined, Frame, Stop, ToServer
from .crash import NATIVE_MARK, CrashReport
from .process import WorkerProcess
from .spawner import Spawner

log = logging.getLogger(__name__)

# A worker that has closed its socket, or was told to stop, has this long to be gone.
EXIT_GRACE_S = 5.0
STDERR_LINES = 100
_LEVELS = {mark: level for level, mark in LEVEL_MARKS.items()}
MARK_LENGTH = 3
# A worker that is stuck has this long to write its stacks.
DUMP_S = 0.5
# A worker that has been killed closes its socket at once, unless the kernel cannot end it.
CLOSE_S = 2.0
# What a worker has written before its end is read for so long at most.
LAST_LINES_S = 0.5


class _Stderr(asyncio.Protocol):
    """Passes a worker's stderr to the log, by the levels that its lines begin with, and keeps the last ones.

    Lines without one are not of a logger: stacks of a crash, or what a library says before it aborts.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._open = b""
        self.lines: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self.closed = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        *whole, self._open = (self._open + data).split(b"\n")
        # A line without end must not grow without end.
        self._open = self._open[-4096:]
        for line in whole:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._tell(text)

    def _tell(self, text: str) -> None:
        level = _LEVELS.get(text[:MARK_LENGTH])
        if level is not None:
            text = text[MARK_LENGTH:]
        else:
            level = logging.ERROR if text.startswith(NATIVE_MARK) else logging.WARNING
        if level > logging.DEBUG and text:
            self.lines.append(text)
        log.log(level, "worker %s: %s", self._name, text, extra={"fields": {"model": self._name}})


def _discard(order: concurrent.futures.Future[WorkerProcess]) -> None:
    if not order.cancelled() and order.exception() is None:
        order.result().discard()


class WorkerLink(asyncio.Protocol):
    """Sends and receives frames. All calls and callbacks on the event loop's thread.

    `on_frame` gets each frame in order. `on_end` is called once, when the process
    is gone: with how it ended, after the last frame. A process that not even
    SIGKILL ends counts as gone after a while; `process.has_ended` tells.
    """

    def __init__(
        self,
        name: str,
        process: WorkerProcess,
        on_frame: Callable[[ToServer], None],
        on_end: Callable[[CrashReport], None],
    ) -> None:
        self.process = process
        self.gone = asyncio.Event()
        self._name = name
        self._on_frame = on_frame
        self._on_end = on_end
        self._buffer = FrameBuffer(to_worker=False)
        self._stderr = _Stderr(name)
        self._transport: asyncio.Transport | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._reaper: asyncio.Task[None] | None = None
        self._stuck = ""

    @classmethod
    async def start(
        cls,
        name: str,
        spawner: Spawner,
        on_frame: Callable[[ToServer], None],
        on_end: Callable[[CrashReport], None],
    ) -> WorkerLink:
        """Starts a process and connects to it. Raises OSError if it cannot be started."""
        order = spawner.order()
        try:
            process = await asyncio.wrap_future(order)
        except asyncio.CancelledError:
            # The spawner may be starting it at this moment: nobody else would end it.
            order.add_done_callback(_discard)
            raise
        link = cls(name, process, on_frame, on_end)
        loop = asyncio.get_running_loop()
        try:
            link._pipe, _ = await loop.connect_read_pipe(lambda: link._stderr, process.stderr)
            await loop.create_connection(lambda: link, sock=process.sock)
        except BaseException:
            if link._pipe is not None:
                link._pipe.close()
            process.discard()
            raise
        return link

    def send(self, frame: Frame) -> None:
        """Sends a frame; nothing if the worker is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(frame))

    async def stop(self) -> None:
        """Asks the worker to end, and returns when it is gone."""
        self.send(Stop())
        try:
            async with asyncio.timeout(EXIT_GRACE_S):
                await self.gone.wait()
        except TimeoutError:
            self.kill()
            await self.gone.wait()

    def kill(self) -> None:
        """Ends the worker at once; `gone` follows, whatever the kernel does."""
        self.process.kill()
        if self._transport is not None:
            asyncio.get_running_loop().call_later(CLOSE_S, self._transport.abort)

    async def end_stuck(self, why: str) -> None:
        """Has the worker write its stacks to the log, if it can, and ends it; `why` goes into the report."""
        self._stuck = why
        if self.process.is_stopped:
            log.error("worker %s is stopped: %s", self._name, why)
        else:
            log.error("worker %s is stuck, its stacks follow: %s", self._name, why)
            self.process.dump()
            await asyncio.sleep(DUMP_S)
        self.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._buffer.feed(data):
                if isinstance(frame, Confined):
                    self.process.confinement.take(frame)
                    continue
                self._on_frame(frame)  # type: ignore[arg-type]  # this buffer decodes ToServer only
        except FrameError:
            log.exception("worker %s sent what is no frame", self._name)
            self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reaper = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        how = await asyncio.to_thread(self.process.wait, EXIT_GRACE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_LINES_S):
                await self._stderr.closed.wait()
        if not self.process.has_ended:
            log.error(
                "WORKER %s IS LEFT: process %d does not end, SIGKILL or not, and holds %d bytes",
                self._name,
                self.process.pid,
                self.process.left_bytes(),
            )
        try:
            report = CrashReport(how, self._stuck, tuple(self._stderr.lines), self.process.suspects())
            self._on_end(report)
        finally:
            assert self._pipe is not None
            self._pipe.close()  # whoever has it too may keep it open for ever
            self.gone.set()
