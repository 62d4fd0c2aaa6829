"""A manager on a shelf with executors, a clock and a memory that tests move by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bear_grpc.errors import BearError, WorkerCrashed
from bear_grpc.executor.limits import ExecutorLimits
from bear_grpc.models.costs import CostStore
from bear_grpc.models.entry import ModelEntry
from bear_grpc.models.eviction import Need
from bear_grpc.models.manager import ModelManager
from bear_grpc.models.registry import Registry
from bear_grpc.models.shelf import Shelf
from bear_grpc.protocol import Ready
from bear_grpc.types import EngineStats, HubSource, LoadOptions, ModelFile, ModelInfo

SOURCE = HubSource("owner/repo", "model.gguf")
STOP_TURNS = 10  # of the loop: a process does not end at once
INFO = ModelInfo("fake", "llama", 300, 2048, 1000, 4000, False)


class FakeTimer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class FakeClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._numbers = itertools.count()
        self._timers: list[tuple[float, int, FakeTimer]] = []

    def now(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(call)
        heapq.heappush(self._timers, (self.now_s + delay_s, next(self._numbers), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Lets time pass, and what is due happen."""
        end_s = self.now_s + seconds
        while self._timers and self._timers[0][0] <= end_s:
            due_s, _, timer = heapq.heappop(self._timers)
            self.now_s = max(self.now_s, due_s)
            if timer.call is not None:
                timer.call()
        self.now_s = end_s


class FakeProcess:
    """A worker's process that no signal ends."""

    def __init__(self, pid: int, held_bytes: int) -> None:
        self.pid = pid
        self.has_ended = False
        self._held_bytes = held_bytes

    def left_bytes(self) -> int:
        return 0 if self.has_ended else self._held_bytes


class FakeExecutor:
    """Loads when the test says so; holds `memory` bytes from then on."""

    def __init__(
        self, name: str, *, on_crash: Callable[[str], bool], on_costs: Callable[[list[Any]], None], **_: Any
    ) -> None:
        self.name = name
        self.stats = EngineStats()
        self.pid = 1
        self.in_flight = 0
        self.memory_bytes = 0
        self.left: tuple[Any, ...] = ()
        self.options: LoadOptions | None = None
        self.chat_template: str | None = None
        self.gone = asyncio.Event()
        self.on_costs = on_costs
        self._on_crash = on_crash
        self._idle = asyncio.Event()
        self._idle.set()
        self._loaded: asyncio.Future[Ready] | None = None
        self.started = asyncio.Event()
        self.deaths = 0
        self.restarts = 0
        self.given_up: BearError | None = None

    @property
    def requests_in_flight(self) -> int:
        return self.in_flight

    @property
    def is_loading(self) -> bool:
        return self._loaded is not None and not self._loaded.done()

    async def load(
        self,
        path: Path,
        options: LoadOptions,
        cores: int,
        costs: Any = (),
        chat_template: str | None = None,
    ) -> Ready:
        self.chat_template = chat_template
        self.options = options
        return await self._wait()

    async def _wait(self) -> Ready:
        self.gone.clear()
        self._loaded = asyncio.get_running_loop().create_future()
        self.started.set()
        try:
            return await self._loaded
        except BaseException:
            self.gone.set()
            raise

    def finish(self, memory_bytes: int = 0) -> None:
        """The load succeeds."""
        assert self._loaded is not None and self.options is not None
        self.memory_bytes = memory_bytes
        chosen = LoadOptions(context_length=512, max_sequences=4, threads=1)
        self._loaded.set_result(Ready(INFO, self.options.over(chosen), 100, 10))

    def fail(self, error: Exception) -> None:
        """The load fails."""
        assert self._loaded is not None
        self._loaded.set_exception(error)

    def crash(self) -> None:
        """The worker of a loaded model dies."""
        self.memory_bytes = 0
        self.gone.set()
        self.deaths += 1
        if not self._on_crash("the worker ended: signal 9"):
            self.give_up(WorkerCrashed(self.name, "signal 9"))

    async def restart(self) -> Ready:
        self.restarts += 1
        return await self._wait()

    def give_up(self, error: BearError) -> None:
        """Requests end with it."""
        self.given_up = error
        self.in_flight = 0
        self._idle.set()

    def begin(self) -> None:
        """A sequence runs."""
        self.in_flight += 1
        self._idle.clear()

    def end(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    def cut_waiting(self, error: Exception) -> int:
        """Nothing waits here."""
        return 0

    async def drain(self, timeout_s: float) -> int:
        if timeout_s > 0:
            waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self.gone)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return self.in_flight

    async def stop(self) -> None:
        self.gone.set()
        for _ in range(STOP_TURNS):
            await asyncio.sleep(0)
        self.memory_bytes = 0


class World:
    """A manager and all that it needs."""

    def __init__(self, folder: Path, model: Path, spawner: Any = None, **options: Any) -> None:
        """`model` is a GGUF file that all models have."""
        self.clock = FakeClock()
        self.model = model
        self.executors: list[FakeExecutor] = []
        self._made = asyncio.Event()
        costs = CostStore(folder / "costs", "test")
        self.shelf = Shelf(
            spawner=spawner, registry=Registry(folder / "registered"), costs=costs, allowed_roots=[folder]
        )
        self.manager = ModelManager(
            self.shelf,
            spawner=spawner,
            costs=costs,
            limits=ExecutorLimits(),
            cores=1,
            executor_factory=self._make,  # type: ignore[arg-type]  # an executor without a process
            clock=self.clock,
            **options,
        )

    async def add(self, name: str, **load_options: Any) -> ModelEntry:
        """A model that has been downloaded."""
        files = [ModelFile(SOURCE.file, "ab", 10)]
        entry = await self.shelf.adopt(
            name, self.model, source=SOURCE, files=files, sha256="ab", size_bytes=10
        )
        entry.load_options = LoadOptions(**load_options)
        return entry

    async def started(self, name: str, count: int = 1) -> FakeExecutor:
        """The executor of a model's load number `count`, once it waits for its worker."""
        async with asyncio.timeout(10):
            while len(found := [e for e in self.executors if e.name == name]) < count:
                self._made.clear()
                await self._made.wait()
            await found[count - 1].started.wait()
        return found[count - 1]

    async def load(self, name: str, options: LoadOptions | None = None, memory: int = 0) -> FakeExecutor:
        """Loads a model that is not loaded."""
        count = 1 + sum(executor.name == name for executor in self.executors)
        loading = asyncio.ensure_future(self.manager.load(name, options))
        executor = await self.started(name, count)
        executor.finish(memory)
        await loading
        return executor

    async def unloaded(self, name: str) -> None:
        """Waits for the end of an unload that is under way."""
        await self.manager.unload(name, 0.0)

    @asynccontextmanager
    async def request(
        self, name: str, keep_alive_s: float | None = None, **options: Any
    ) -> AsyncIterator[FakeExecutor]:
        """A request that runs on a model."""
        async with self.manager.using(name, keep_alive_s, **options) as executor:
            assert isinstance(executor, FakeExecutor)
            executor.begin()
            try:
                yield executor
            finally:
                executor.end()

    def _make(self, name: str, **rest: Any) -> FakeExecutor:
        executor = FakeExecutor(name, **rest)
        self.executors.append(executor)
        self._made.set()
        return executor


class Host:
    """Memory that holds so many models of one unit each; a plan waits for the gate."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.world: World | None = None
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def plan(self, entry: ModelEntry, options: LoadOptions) -> Need:
        if not self.gate.is_set():
            self.waiting.set()
            await self.gate.wait()
        await asyncio.sleep(0)
        assert self.world is not None
        taken = sum(executor.memory_bytes for executor in self.world.executors)
        return Need(1, self.units - taken)


async def outcome(call: Awaitable[Any]) -> BearError | None:
    """The error that a call ends with."""
    try:
        await call
    except BearError as exc:
        return exc
    return None


async def use(world: World, name: str, keep_alive_s: float | None = None) -> None:
    """A request that ends at once."""
    async with world.request(name, keep_alive_s):
        pass
