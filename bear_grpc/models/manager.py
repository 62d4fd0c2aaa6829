"""The life of loaded models: who loads, who waits for a load, who is ended."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from typing import TypeVar

from ..errors import (
    BackendError,
    BearError,
    Draining,
    InvalidField,
    LoadConflict,
    ModelAlreadyLoaded,
    ModelNotLoaded,
    ModelUnloaded,
    WorkerCrashed,
)
from ..executor.executor import ExecutorLimits, ModelExecutor
from ..executor.share import CpuShare
from ..executor.spawner import Spawner
from ..protocol import Progress
from ..types import CostTable, LoadOptions, ModelState, StateReason
from .costs import CostStore, is_sound
from .entry import ModelEntry, header_of
from .shelf import Shelf

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(slots=True, frozen=True)
class Unloaded:
    """What an unload gave back, and how many requests it cut."""

    released_bytes: int
    cancelled: int


class ModelManager:
    """Event loop only. Loads and unloads go on when their callers leave."""

    def __init__(
        self, shelf: Shelf, *, spawner: Spawner, costs: CostStore, limits: ExecutorLimits, cores: int
    ) -> None:
        self._shelf = shelf
        self._costs = costs
        self._spawner = spawner
        self._limits = limits
        self._cores = cores
        self._share = CpuShare()
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unloads: dict[str, asyncio.Task[Unloaded]] = {}
        # Files follow each other in the order of the measurements.
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self.draining = False

    async def load(self, name: str, options: LoadOptions | None = None) -> tuple[ModelEntry, float]:
        """Loads a model, joins a load under way, or finds it loaded; with the seconds it took.

        Raises LoadConflict, ModelAlreadyLoaded, and what the load raises.
        """
        entry = self._shelf.get(name)
        task = self._begin_load(entry, options or LoadOptions())
        if task is None:
            return entry, 0.0
        await asyncio.shield(task)
        return entry, entry.load_seconds

    async def executor(self, name: str, *, load_if_needed: bool = True) -> ModelExecutor:
        """The executor of a model, loaded first if need be and allowed.

        Raises ModelNotLoaded, ModelUnloaded, Draining, and what the load raises.
        """
        if self.draining:
            raise Draining()
        entry = self._shelf.get(name)
        if entry.state is ModelState.UNLOADING:
            raise ModelUnloaded(entry.name)
        if entry.state is not ModelState.READY:
            if not load_if_needed and entry.state is not ModelState.LOADING:
                raise ModelNotLoaded(entry.name)
            await self.load(entry.name)
        if entry.executor is None:
            raise ModelUnloaded(entry.name)
        return entry.executor

    async def unload(self, name: str, drain_timeout_s: float) -> Unloaded:
        """Ends a model's worker; joins an unload under way. Raises ModelNotLoaded."""
        entry = self._shelf.get(name)
        task = self._unloads.get(entry.name)
        if task is None:
            if entry.state not in (ModelState.LOADING, ModelState.READY):
                raise ModelNotLoaded(entry.name)
            task = asyncio.create_task(self._unload(entry, drain_timeout_s))
            self._unloads[entry.name] = task
            task.add_done_callback(functools.partial(_forget, self._unloads, entry.name))
        return await asyncio.shield(task)

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new and waits for what runs and waits, up to `timeout_s`."""
        self.draining = True
        busy = [
            entry.executor
            for entry in self._shelf.list()
            if entry.state in (ModelState.READY, ModelState.UNLOADING) and entry.executor is not None
        ]
        await asyncio.gather(*(executor.drain(timeout_s) for executor in busy))

    async def close(self) -> None:
        """Ends every worker; nothing is loaded from now on."""
        self.draining = True
        for entry in self._shelf.list():
            if entry.state is ModelState.UNLOADING and entry.executor is not None:
                # Its drain may have hours left: what it waits for ends here.
                await entry.executor.stop()
        busy = [entry.name for entry in self._shelf.list() if entry.executor is not None]
        await asyncio.gather(*(self.unload(name, 0.0) for name in busy), return_exceptions=True)
        await asyncio.gather(*self._keeping.values())

    def _begin_load(self, entry: ModelEntry, options: LoadOptions) -> asyncio.Task[None] | None:
        """The task of a load, begun or joined; None if the model is loaded as asked."""
        if self.draining:
            raise Draining()
        match entry.state:
            case ModelState.READY:
                assert entry.ready is not None
                # What was asked for the first time may differ from what it came to.
                differing = set(options.differing(entry.ready.options)) & set(options.differing(entry.asked))
                if differing:
                    raise ModelAlreadyLoaded(entry.name, sorted(differing))
                return None
            case ModelState.LOADING:
                if options.differing(entry.asked):
                    raise LoadConflict(entry.name, "is being loaded with other options")
                return self._loads[entry.name]
            case ModelState.UNLOADING:
                raise LoadConflict(entry.name, "is being unloaded")
        longest = entry.header.context_length if entry.header is not None else None
        if longest and options.context_length and options.context_length > longest:
            limit = f"must be 1 to {longest}, the model's own context; is {options.context_length}"
            raise InvalidField("options.context_length", limit)
        entry.move(ModelState.LOADING)
        entry.asked = options.over(entry.load_options)
        task = asyncio.create_task(self._load(entry))
        self._loads[entry.name] = task
        task.add_done_callback(functools.partial(self._load_done, entry))
        return task

    def _load_done(self, entry: ModelEntry, task: asyncio.Task[None]) -> None:
        _forget(self._loads, entry.name, task)
        error = task.exception()
        if error is not None:
            log.warning("loading %s failed: %s", entry.name, error)

    async def _load(self, entry: ModelEntry) -> None:
        began = time.monotonic()

        def on_progress(progress: Progress) -> None:
            entry.stage, entry.fraction = progress.stage, progress.fraction
            self._shelf.feed.publish(entry.status())

        def on_costs(tables: list[CostTable]) -> None:
            self._keep_costs(entry, tables)

        def on_crash(how: str) -> None:
            if entry.state is not ModelState.UNLOADING:  # an unload ends as it would have
                self._move(entry, ModelState.FAILED, StateReason.WORKER_CRASHED, f"the worker ended: {how}")

        entry.executor = executor = ModelExecutor(
            entry.name,
            spawner=self._spawner,
            share=self._share,
            limits=self._limits,
            on_progress=on_progress,
            on_costs=on_costs,
            on_crash=on_crash,
        )
        self._shelf.feed.publish(entry.status())
        try:
            if not entry.is_embedded:
                # The path may have become a link since it was registered.
                await asyncio.to_thread(self._shelf.resolve, str(entry.path))
            entry.header = await asyncio.to_thread(header_of, entry.path)
            entry.cost_tables = await asyncio.to_thread(self._costs.read, entry.path)
            entry.ready = await executor.load(entry.path, entry.asked, self._cores, entry.cost_tables)
        except asyncio.CancelledError:
            self._move(entry, ModelState.AVAILABLE)
            raise ModelUnloaded(entry.name) from None
        except BearError as exc:
            self._move(entry, ModelState.FAILED, StateReason.LOAD_FAILED, exc.message)
            raise
        except Exception as exc:
            log.exception("loading %s failed", entry.name)
            self._move(entry, ModelState.FAILED, StateReason.LOAD_FAILED, "internal error")
            raise BackendError("the load failed") from exc
        if entry.state is not ModelState.LOADING:  # it died between its last word and this line
            raise WorkerCrashed(entry.name, entry.message)
        entry.load_seconds = time.monotonic() - began
        self._move(entry, ModelState.READY)
        log.info("%s is ready after %.2f s", entry.name, entry.load_seconds)

    async def _unload(self, entry: ModelEntry, drain_timeout_s: float) -> Unloaded:
        executor = entry.executor
        if entry.state is ModelState.LOADING or executor is None:
            task = self._loads.get(entry.name)
            if task is None:  # it has just failed or crashed
                raise ModelNotLoaded(entry.name)
            task.cancel()
            await asyncio.wait([task])
            return Unloaded(0, 0)
        self._move(entry, ModelState.UNLOADING)
        cancelled = await executor.drain(drain_timeout_s)
        held = executor.memory_bytes
        await executor.stop()
        self._move(entry, ModelState.AVAILABLE)
        log.info("%s is unloaded, %d bytes are free again", entry.name, held)
        return Unloaded(held, cancelled)

    def _keep_costs(self, entry: ModelEntry, tables: list[CostTable]) -> None:
        """Takes what a worker has measured; on the disk it replaces what was there."""
        if not all(map(is_sound, tables)):
            log.warning("the worker of %s sent step times that are none", entry.name)
            return
        entry.cost_tables = tables
        writing = self._keeping.get(entry.name)
        if writing is None or writing.done():
            task = asyncio.create_task(self._write_costs(entry))
            self._keeping[entry.name] = task
            task.add_done_callback(functools.partial(_forget, self._keeping, entry.name))

    async def _write_costs(self, entry: ModelEntry) -> None:
        """Writes until what is written is what is known."""
        written: list[CostTable] | None = None
        while written is not entry.cost_tables:
            written = entry.cost_tables
            await asyncio.to_thread(self._costs.write, entry.path, written)

    def _move(
        self, entry: ModelEntry, state: ModelState, reason: StateReason | None = None, message: str = ""
    ) -> None:
        entry.move(state, reason, message)
        self._shelf.feed.publish(entry.status())


def _forget(tasks: dict[str, asyncio.Task[T]], name: str, task: asyncio.Task[T]) -> None:
    """Removes a task that is done, but not one that has taken its place meanwhile."""
    if tasks.get(name) is task:
        del tasks[name]
