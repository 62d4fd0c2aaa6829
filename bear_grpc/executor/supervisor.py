"""The worker process of one model: started, watched, and started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..errors import EngineStartFailed, from_record
from ..protocol import Failed, Frame, Heartbeat, Load, Progress, Ready, ToServer
from ..types import LoadStage
from .crash import CrashReport
from .link import WorkerLink
from .process import WorkerProcess
from .share import CpuShare
from .spawner import Spawner
from .watch import CHECK_S, Watch


class Supervisor:
    """One process at a time, each with the same model. Event loop only."""

    def __init__(
        self,
        name: str,
        *,
        spawner: Spawner,
        share: CpuShare,
        heartbeat_timeout_s: float,
        startup_timeout_s: float,
        on_frame: Callable[[ToServer], None],
        on_end: Callable[[CrashReport], None],
    ) -> None:
        """`on_frame` gets what a worker tells besides its load and its life. The limits are those of `Watch`.

        `on_end` is called when a worker that was live has ended, asked to or not.
        """
        self.is_live = False  # whether there is a worker that takes work
        self._name = name
        self._spawner = spawner
        self._share = share
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._on_frame = on_frame
        self._on_end = on_end
        self._link: WorkerLink | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._watch: Watch | None = None
        self._watching: asyncio.Task[None] | None = None
        self._left: list[WorkerProcess] = []

    @property
    def pid(self) -> int:
        """The worker's process id, 0 while there is none."""
        return self._link.process.pid if self._link is not None else 0

    @property
    def memory_bytes(self) -> int:
        """What the worker's process holds; 0 where the system does not tell. Any thread; it takes a while."""
        link = self._link
        return link.process.memory_bytes() if link is not None else 0

    @property
    def left(self) -> tuple[WorkerProcess, ...]:
        """Workers of before, which not even SIGKILL has ended yet."""
        self._left = [process for process in self._left if not process.has_ended]
        return tuple(self._left)

    async def start(self, load: Load) -> Ready:
        """Starts a worker and loads the model. On any error the worker is gone.

        Raises what the worker says, or EngineStartFailed when it dies or is stuck before it is ready.
        """
        self._ready = asyncio.get_running_loop().create_future()
        try:
            self._link = link = await WorkerLink.start(self._name, self._spawner, self._take, self._end)
            self._begin_watch(link)
            link.send(load)
            ready = await self._ready
        except OSError as exc:
            raise EngineStartFailed(f"the worker process could not be started ({exc.strerror})") from exc
        except BaseException:
            self._ready.cancel()
            await self._kill()
            raise
        self._go_live(link)
        return ready

    def send(self, frame: Frame) -> None:
        """To the worker; lost if it is not live."""
        if self.is_live and self._link is not None:
            self._link.send(frame)

    def set_busy(self, busy: bool) -> None:
        """Whether the worker has something to compute."""
        self._share.set_busy(self, busy and self.is_live)

    async def stop(self) -> None:
        """Ends the worker in good order, or else at once; returns when it is gone."""
        if self._link is not None:
            await self._link.stop()

    async def _kill(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.kill()
            await link.gone.wait()
            self._part(link)

    def _go_live(self, link: WorkerLink) -> None:
        if self._link is not link:  # it has died between its last word and this line
            raise EngineStartFailed("the worker ended at the end of its load")
        self.is_live = True
        self._share.join(self, link.send)

    def _begin_watch(self, link: WorkerLink) -> None:
        self._watch = Watch(time.monotonic, self._heartbeat_timeout_s, self._startup_timeout_s)
        self._watching = asyncio.create_task(self._watch_over(link, self._watch))

    def _part(self, link: WorkerLink) -> None:
        """The worker is gone, or will not go."""
        if self._watching is not None:
            self._watching.cancel()
        if not link.process.has_ended:
            self._left.append(link.process)

    async def _watch_over(self, link: WorkerLink, watch: Watch) -> None:
        """Ends a worker that is stuck."""
        why = None
        while why is None:
            await asyncio.sleep(CHECK_S)
            why = watch.overdue()
        await link.end_stuck(why)

    def _take(self, frame: ToServer) -> None:
        match frame:
            case Heartbeat():
                if self._watch is not None:
                    self._watch.beat(frame)
            case Ready() if self._ready is not None and not self._ready.done():
                self._ready.set_result(frame)
            case Failed() if self._ready is not None and not self._ready.done():
                self._ready.set_exception(from_record(frame.error))
            case Progress() if frame.stage is not LoadStage.STARTING and self._watch is not None:
                self._watch.has_started()
                self._on_frame(frame)
            case _:
                self._on_frame(frame)

    def _end(self, report: CrashReport) -> None:
        was_live, self.is_live = self.is_live, False
        link, self._link = self._link, None
        if link is not None:
            self._part(link)
        if self._ready is not None and not self._ready.done():
            words = report.lines[-1] if report.lines else ""
            cause = f"the worker ended while loading ({report.cause})" + (f": {words}" if words else "")
            self._ready.set_exception(EngineStartFailed(cause))
        if was_live:
            self._share.leave(self)
            self._on_end(report)
