"""The life of loaded models: who loads, who waits for a load, who is unloaded when."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from ..errors import (
    BearError,
    Draining,
    InvalidField,
    LoadConflict,
    LoadCooldown,
    ModelAlreadyLoaded,
    ModelNotLoaded,
    ModelUnloaded,
)
from ..executor.executor import ModelExecutor
from ..executor.limits import ExecutorLimits
from ..executor.share import CpuShare
from ..executor.spawner import Spawner
from ..types import LoadOptions, ModelState, StateReason
from .arrivals import Arrivals
from .clock import Clock, LoopClock
from .cooldown import Cooldown
from .cost_keeping import CostKeeper
from .costs import CostStore
from .entry import ModelEntry, ModelStatus
from .eviction import Plan, Room
from .gate import Gate
from .keeping import HOLD_S, KeepAlive
from .loader import ExecutorFactory, Loader
from .restarts import Restarts
from .shelf import Shelf
from .unloads import Unloaded, Unloads

log = logging.getLogger(__name__)

EnsureFile = Callable[[str], Awaitable[None]]


class ModelManager:
    """Event loop only. Loads and unloads go on when their callers leave."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        spawner: Spawner,
        costs: CostStore,
        limits: ExecutorLimits,
        cores: int,
        keep_alive_s: float = -1.0,
        ensure_file: EnsureFile | None = None,
        plan: Plan | None = None,
        executor_factory: ExecutorFactory = ModelExecutor,
        clock: Clock | None = None,
    ) -> None:
        """`keep_alive_s` is of models that name none, negative: for ever. `ensure_file` gets the name of
        a model that is needed and has no file here, and returns when it has; `plan` tells what a load
        takes of the memory.
        """
        clock = clock or LoopClock()
        self._shelf = shelf
        self._keep_alive_s = keep_alive_s
        self._ensure_file = ensure_file
        self._costs = CostKeeper(costs)
        self._keep = KeepAlive(clock, self._on_expired)
        self._cooldown = Cooldown(clock)
        self._share = CpuShare()
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unloads = Unloads(shelf, self._loads)
        room = Room(plan, longest_idle=self._longest_idle, evict=self._unloads.begin_own)
        self._restarts = Restarts(shelf, room, self._cooldown, clock)
        self._loader = Loader(
            shelf,
            room,
            spawner=spawner,
            share=self._share,
            costs=self._costs,
            limits=limits,
            cores=cores,
            factory=executor_factory,
            cooldown=self._cooldown,
            restart=self._restart,
        )
        self._arrivals = Arrivals(limits.max_waiting)
        self._gate = Gate()
        shelf.feed.listen(self._on_change)

    def set_max_waiting(self, count: int) -> None:
        """How many requests may wait for each model, loaded ones included; who waits already stays."""
        self._loader.set_max_waiting(count)
        self._arrivals.set_limit(count)
        for entry in self._shelf.list():
            if entry.executor is not None:
                entry.executor.set_max_waiting(count)

    def set_keep_alive(self, seconds: float) -> None:
        """Of models that name no time of their own; idle ones begin their rest anew."""
        before, self._keep_alive_s = self._keep_alive_s, seconds
        for entry in self._shelf.list():
            is_loaded = entry.state in (ModelState.READY, ModelState.LOADING)
            if is_loaded and entry.asked.keep_alive_s is None and entry.keep_alive_s == before:
                self._change_life(entry, LoadOptions(keep_alive_s=seconds))

    async def load(self, name: str, options: LoadOptions | None = None) -> tuple[ModelEntry, float]:
        """Loads a model, joins a load under way, or finds it loaded; with the seconds it took.

        It is tried at once, however often it has failed. Of a model that is loaded, other `keep_alive_s`
        and `pinned` are taken over. Raises Draining, LoadConflict, ModelAlreadyLoaded, and what the load
        raises.
        """
        async with self._gate.waiting():
            entry = await self._with_file(name)
            await self._unloads.settle(entry)
            task = self._begin_load(entry, options or LoadOptions())
            if task is None:
                return entry, 0.0
            await asyncio.shield(task)
            return entry, entry.load_seconds

    @asynccontextmanager
    async def using(
        self, name: str, keep_alive_s: float | None = None, *, load_if_needed: bool = True
    ) -> AsyncIterator[ModelExecutor]:
        """The executor of a model, downloaded and loaded first if need be and allowed, for one use of it.

        As long as the use lasts, the model is neither unloaded for others nor for being idle; after it,
        `keep_alive_s` is how long the model stays: None the model's own time, 0 not at all, negative for
        ever. Raises Draining, ModelNotFound, ModelFileNotFound, ModelNotLoaded, ModelUnloaded,
        LoadCooldown, and what a download or a load raises.
        """
        with self._gate.enter():
            async with self._gate.waiting():
                with self._arrivals.wait(name):
                    entry = await self._with_file(name) if load_if_needed else self._shelf.get(name)
            self._keep.begin(entry)
            try:
                async with self._gate.waiting():
                    executor = await self._executor(entry, load_if_needed)
                yield executor
            finally:
                self._keep.end(entry, keep_alive_s)

    async def executor(
        self, name: str, *, load_if_needed: bool = True, hold_s: float = HOLD_S
    ) -> ModelExecutor:
        """As `using`, for a short call: the use is taken to last `hold_s` from the moment it is loaded."""
        async with self.using(name, load_if_needed=load_if_needed) as executor:
            self._keep.hold(self._shelf.get(executor.name), hold_s)
            return executor

    async def unload(self, name: str, drain_timeout_s: float) -> Unloaded:
        """Ends a model's worker; joins an unload under way. Raises ModelNotLoaded."""
        return await asyncio.shield(self._unloads.begin(self._shelf.get(name), drain_timeout_s))

    @property
    def is_draining(self) -> bool:
        """Whether no new work is taken."""
        return self._gate.is_closed

    @property
    def remaining(self) -> int:
        """Generations under way, those included that wait for their model."""
        return self._gate.inside

    def refuse(self) -> None:
        """Takes nothing new from here on; what waits and has not begun ends with Draining."""
        self._gate.close()
        for executor in self._live_executors():
            executor.cut_waiting(Draining())

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new and waits for what runs, and until it is sent, up to `timeout_s`."""
        self.refuse()
        ends_s = asyncio.get_running_loop().time() + timeout_s
        await self._gate.empty(timeout_s)
        left_s = max(0.0, ends_s - asyncio.get_running_loop().time())
        await asyncio.gather(*(executor.drain(left_s) for executor in self._live_executors()))

    def _live_executors(self) -> list[ModelExecutor]:
        return [
            entry.executor
            for entry in self._shelf.list()
            if entry.executor is not None
            and (entry.state is not ModelState.LOADING or entry.reason is StateReason.RESTARTING)
        ]

    async def close(self) -> None:
        """Ends every worker; nothing is loaded from now on."""
        self._gate.close()
        self._keep.close()
        for entry in self._shelf.list():
            if entry.state is ModelState.UNLOADING and entry.executor is not None:
                # Its drain may have hours left: what it waits for ends here.
                await entry.executor.stop()
        busy = [entry.name for entry in self._shelf.list() if entry.is_in_use]
        ends = await asyncio.gather(*(self.unload(name, 0.0) for name in busy), return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, BearError):  # some were gone already
                log.error("an unload failed", exc_info=end)
        await self._costs.close()

    async def _with_file(self, name: str) -> ModelEntry:
        """A model whose file is here, or was when it was registered; downloaded if need be and allowed."""
        entry = self._shelf.find(name)
        is_missing = entry is not None and entry.source is not None and entry.path is None
        if self._ensure_file is not None and (is_missing or (entry is None and "/" in name)):
            await self._ensure_file(name)
        entry = self._shelf.get(name)
        entry.check_file()
        return entry

    async def _executor(self, entry: ModelEntry, load_if_needed: bool) -> ModelExecutor:
        await self._unloads.settle(entry)
        if entry.state is ModelState.UNLOADING:
            raise ModelUnloaded(entry.name)
        if entry.state is not ModelState.READY:
            if not load_if_needed and entry.state is not ModelState.LOADING:
                raise ModelNotLoaded(entry.name)
            self._check_cooldown(entry)
            task = self._begin_load(entry, LoadOptions())
            if task is not None:
                ahead = 0 if entry.executor is None else entry.executor.in_flight
                with self._arrivals.wait(entry.name, ahead):
                    await asyncio.shield(task)
        if entry.state is not ModelState.READY or entry.executor is None:
            raise ModelUnloaded(entry.name)
        return entry.executor

    def _check_cooldown(self, entry: ModelEntry) -> None:
        """Raises LoadCooldown for a load that nobody has asked for by name, too soon after a failure."""
        left_s = self._cooldown.left_s(entry.name)
        if entry.state is not ModelState.FAILED or left_s <= 0:
            return
        if entry.reason is not StateReason.COOLDOWN:
            entry.reason = StateReason.COOLDOWN
            self._shelf.feed.publish(entry.status())
        raise LoadCooldown(entry.name, entry.message, left_s)

    def _begin_load(self, entry: ModelEntry, options: LoadOptions) -> asyncio.Task[None] | None:
        """The task of a load, begun or joined; None if the model is loaded as asked."""
        self._gate.check()
        # What belongs to the model's life may change while it lives.
        of_load = msgspec.structs.replace(options, keep_alive_s=None, pinned=None)
        match entry.state:
            case ModelState.READY:
                assert entry.ready is not None
                # What was asked for the first time may differ from what it came to.
                differing = set(of_load.differing(entry.ready.options)) & set(of_load.differing(entry.asked))
                if differing:
                    raise ModelAlreadyLoaded(entry.name, sorted(differing))
                self._change_life(entry, options)
                return None
            case ModelState.LOADING:
                if of_load.differing(entry.asked):
                    raise LoadConflict(entry.name, "is being loaded with other options")
                self._change_life(entry, options)
                return self._loads[entry.name]
            case ModelState.UNLOADING:
                raise LoadConflict(entry.name, "is being unloaded")
        longest = entry.header.context_length if entry.header is not None else None
        if longest and options.context_length and options.context_length > longest:
            limit = f"must be 1 to {longest}, the model's own context; is {options.context_length}"
            raise InvalidField("options.context_length", limit)
        asked = options.over(entry.load_options)
        entry.keep_alive_s = self._keep_alive_s if asked.keep_alive_s is None else asked.keep_alive_s
        entry.pinned = bool(asked.pinned)
        executor = self._loader.begin(entry, asked)
        return self._run_load(entry, self._loader.run(entry, executor))

    def _restart(self, entry: ModelEntry, executor: ModelExecutor, how: str) -> None:
        """Whoever needs the model meanwhile joins it, as a load."""
        self._restarts.begin(entry, how)
        self._run_load(entry, self._restarts.run(entry, executor))

    def _run_load(self, entry: ModelEntry, load: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._load(entry, load))
        self._loads[entry.name] = task
        task.add_done_callback(functools.partial(self._load_done, entry))
        return task

    async def _load(self, entry: ModelEntry, load: Coroutine[Any, Any, None]) -> None:
        await load
        self._keep.rest(entry)

    def _load_done(self, entry: ModelEntry, task: asyncio.Task[None]) -> None:
        # Another load may have taken its place at the moment at which it failed.
        if self._loads.get(entry.name) is task:
            del self._loads[entry.name]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.warning("loading %s failed: %s", entry.name, error)

    def _change_life(self, entry: ModelEntry, options: LoadOptions) -> None:
        """Takes over how long a loaded model is kept, and whether it must stay."""
        if options.pinned is not None:
            entry.pinned = options.pinned
        if options.keep_alive_s is not None:
            entry.keep_alive_s = options.keep_alive_s
            self._keep.rest(entry)
        if options.pinned is not None or options.keep_alive_s is not None:
            self._shelf.feed.publish(entry.status())

    def _on_change(self, status: ModelStatus) -> None:
        entry = self._shelf.find(status.name)
        if entry is not None and not entry.is_ready:
            self._keep.stop(entry)

    def _on_expired(self, entry: ModelEntry) -> None:
        self._unloads.begin_own(entry, "nobody has used it for its keep_alive_s")

    def _longest_idle(self) -> ModelEntry | None:
        """The model that goes first when another one needs its memory."""
        entries = self._shelf.list()
        idle = [e for e in entries if e.is_ready and not e.pinned and not self._keep.is_busy(e)]
        return min(idle, key=self._keep.used_s, default=None)
