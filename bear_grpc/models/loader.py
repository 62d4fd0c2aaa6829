"""One load from LOADING to its end: file, room in memory, worker."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from ..errors import (
    BackendError,
    BearError,
    Conflict,
    InvalidRequest,
    ModelFileNotFound,
    ModelUnloaded,
    NotFound,
)
from ..executor.executor import ModelExecutor
from ..executor.limits import ExecutorLimits
from ..executor.share import CpuShare
from ..executor.spawner import Spawner
from ..protocol import Progress, Ready
from ..types import CostTable, LoadOptions, ModelState, StateReason
from .cooldown import Cooldown
from .cost_keeping import CostKeeper
from .entry import ModelEntry, header_of
from .eviction import Room
from .shelf import Shelf

log = logging.getLogger(__name__)

# What time does not mend, such as a file that is no model: it is told anew to everyone who asks.
DEFINITE = (InvalidRequest, NotFound, Conflict)


class ExecutorFactory(Protocol):
    """Makes the executor of a load; ModelExecutor is one."""

    def __call__(
        self,
        name: str,
        *,
        spawner: Spawner,
        share: CpuShare,
        limits: ExecutorLimits,
        on_progress: Callable[[Progress], None],
        on_costs: Callable[[list[CostTable]], None],
        on_crash: Callable[[str], bool],
    ) -> ModelExecutor: ...


class Loader:
    """Event loop only. `begin`, then `run` in a task of its own."""

    def __init__(
        self,
        shelf: Shelf,
        room: Room,
        *,
        spawner: Spawner,
        share: CpuShare,
        costs: CostKeeper,
        limits: ExecutorLimits,
        cores: int,
        factory: ExecutorFactory,
        cooldown: Cooldown,
        restart: Callable[[ModelEntry, ModelExecutor, str], None],
    ) -> None:
        """`restart` has the worker of a loaded model, which has died as it is told, started again."""
        self._shelf = shelf
        self._room = room
        self._cooldown = cooldown
        self._restart = restart
        self._spawner = spawner
        self._costs = costs
        self._limits = limits
        self._cores = cores
        self._factory = factory
        self._share = share

    def set_max_waiting(self, count: int) -> None:
        """Of the next models to be loaded."""
        self._limits = msgspec.structs.replace(self._limits, max_waiting=count)

    def begin(self, entry: ModelEntry, asked: LoadOptions) -> ModelExecutor:
        """Moves a model to LOADING, with the executor that `run` starts."""

        def on_progress(progress: Progress) -> None:
            entry.stage, entry.fraction = progress.stage, progress.fraction
            self._shelf.feed.publish(entry.status())

        def on_costs(tables: list[CostTable]) -> None:
            self._costs.take(entry, tables)

        def on_crash(how: str) -> bool:
            if entry.executor is not executor or entry.state is not ModelState.READY:
                return False  # an unload ends as it would have
            self._restart(entry, executor, how)
            return True

        executor = self._factory(
            entry.name,
            spawner=self._spawner,
            share=self._share,
            limits=self._limits,
            on_progress=on_progress,
            on_costs=on_costs,
            on_crash=on_crash,
        )
        entry.move(ModelState.LOADING)
        entry.asked, entry.executor = asked, executor
        self._shelf.feed.publish(entry.status())
        return executor

    async def run(self, entry: ModelEntry, executor: ModelExecutor) -> None:
        """Ends in READY; else in FAILED, or in AVAILABLE when it is cancelled, and raises the cause.

        Cancelling it raises ModelUnloaded.
        """
        began = time.monotonic()
        try:
            await self._check_file(entry)
            async with self._room.kept_for(entry):
                ready = await self._start(entry, executor)
        except asyncio.CancelledError:
            self._shelf.move(entry, ModelState.AVAILABLE)
            raise ModelUnloaded(entry.name) from None
        except BearError as exc:
            self._shelf.move(entry, ModelState.FAILED, StateReason.LOAD_FAILED, exc.message)
            if isinstance(exc, ModelFileNotFound) and entry.source is not None:
                self._shelf.drop(entry.name)  # somebody took the download away: it can be had again
            raise
        except Exception as exc:
            log.exception("loading %s failed", entry.name)
            self._shelf.move(entry, ModelState.FAILED, StateReason.LOAD_FAILED, "internal error")
            raise BackendError("the load failed") from exc
        self._cooldown.forget(entry.name)
        entry.ready, entry.load_seconds = ready, time.monotonic() - began
        self._shelf.move(entry, ModelState.READY)
        log.info("%s is ready after %.2f s", entry.name, entry.load_seconds)

    async def _check_file(self, entry: ModelEntry) -> None:
        """Reads its header anew: it may be another file than it was."""
        if not entry.is_embedded and entry.source is None:
            # The path may have become a link since it was registered.
            await asyncio.to_thread(self._shelf.resolve, str(entry.file))
        entry.header = await asyncio.to_thread(header_of, entry.file)
        entry.cost_tables = await self._costs.read(entry)

    async def _start(self, entry: ModelEntry, executor: ModelExecutor) -> Ready:
        # How long it is kept is the server's own: what is measured is kept by the worker's options.
        options = msgspec.structs.replace(entry.asked, keep_alive_s=None, pinned=None)
        try:
            return await executor.load(
                entry.file, options, self._cores, entry.cost_tables, entry.chat_template
            )
        except DEFINITE:
            raise
        except Exception:
            self._cooldown.failed(entry.name)
            raise
