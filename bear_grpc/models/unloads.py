"""Unloads under way: one for each model, however many ask for it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping

from ..errors import ModelNotLoaded, ModelUnloaded
from ..types import ModelState
from .entry import ModelEntry
from .shelf import Shelf

log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True, frozen=True)
class Unloaded:
    """What an unload gave back, and how many requests it cut."""

    released_bytes: int
    cancelled: int


class Unloads:
    """Event loop only. They go on when their callers leave."""

    def __init__(self, shelf: Shelf, loads: Mapping[str, asyncio.Task[None]]) -> None:
        """`loads` are those under way, which an unload ends."""
        self._shelf = shelf
        self._loads = loads
        self._tasks: dict[str, asyncio.Task[Unloaded]] = {}
        self._own: set[str] = set()

    def begin(self, entry: ModelEntry, drain_timeout_s: float) -> asyncio.Task[Unloaded]:
        """Begins an unload somebody asked for, or joins one: from here on a loaded model takes nothing new.

        Raises ModelNotLoaded.
        """
        return self._tasks.get(entry.name) or self._begin(entry, drain_timeout_s)

    def begin_own(self, entry: ModelEntry, why: str) -> asyncio.Task[Unloaded]:
        """The same for a model that is idle, of the server's own accord."""
        log.info("%s is unloaded: %s", entry.name, why)
        task = self._begin(entry, 0.0)
        self._own.add(entry.name)
        task.add_done_callback(_tell)
        return task

    async def settle(self, entry: ModelEntry) -> None:
        """Waits for an unload that nobody asked for: who needs the model then loads it again."""
        while entry.state is ModelState.UNLOADING and entry.name in self._own:
            await asyncio.wait([self._tasks[entry.name]])

    def _begin(self, entry: ModelEntry, drain_timeout_s: float) -> asyncio.Task[Unloaded]:
        if entry.state is ModelState.READY:
            # At once: no request may find it loaded between now and the task's first step.
            self._shelf.move(entry, ModelState.UNLOADING)
        elif entry.state is not ModelState.LOADING:
            raise ModelNotLoaded(entry.name)
        self._tasks[entry.name] = task = asyncio.create_task(self._run(entry, drain_timeout_s))
        return task

    async def _run(self, entry: ModelEntry, drain_timeout_s: float) -> Unloaded:
        try:
            await self._end_load(entry)
            if entry.state is ModelState.AVAILABLE:
                return Unloaded(0, 0)
            if entry.state is ModelState.READY:  # it was faster
                self._shelf.move(entry, ModelState.UNLOADING)
            if entry.state is not ModelState.UNLOADING:  # it has just failed or crashed
                raise ModelNotLoaded(entry.name)
            return await self._end(entry, drain_timeout_s)
        finally:
            self._own.discard(entry.name)
            del self._tasks[entry.name]

    async def _end_load(self, entry: ModelEntry) -> None:
        if entry.state is ModelState.LOADING:
            load = self._loads[entry.name]
            load.cancel()
            await asyncio.wait([load])

    async def _end(self, entry: ModelEntry, drain_timeout_s: float) -> Unloaded:
        executor = entry.executor
        assert executor is not None
        # Nothing of what waits has reached a caller: it can be asked for elsewhere, without a loss.
        waiting = executor.cut_waiting(ModelUnloaded(entry.name))
        cut = await executor.drain(drain_timeout_s)
        held = executor.memory_bytes
        await executor.stop()
        # Its end gives everything back: what is still held is held by a process that has not ended.
        left = executor.left
        left_bytes = sum(process.left_bytes() for process in left)
        free = max(0, held - left_bytes)
        message = ""
        if left:
            message = f"process {', '.join(str(process.pid) for process in left)} does not end"
            log.error("%s IS UNLOADED, BUT %s: %d bytes are not free", entry.name, message, left_bytes)
        self._shelf.move(entry, ModelState.AVAILABLE, message=message)
        log.info("%s is unloaded, %d bytes are free again", entry.name, free)
        return Unloaded(free, waiting + cut)


def _tell(task: asyncio.Task[Unloaded]) -> None:
    error = task.exception()
    if error is not None:
        log.error("an unload failed", exc_info=error)
