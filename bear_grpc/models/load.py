"""How much is asked of the server right now, read when somebody asks."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from ..executor.executor import ModelExecutor
from ..executor.memory import memory_of
from .entry import ModelEntry
from .shelf import Shelf

MEMORY_FRESH_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLoad:
    """One loaded model; rates are tokens per second over the last seconds."""

    name: str
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    slots: int = 0
    kv_used_tokens: int = 0
    kv_idle_tokens: int = 0
    kv_tokens: int = 0
    prefill_rate: float = 0.0
    decode_rate: float = 0.0
    memory_bytes: int = 0

    @property
    def kv_utilization(self) -> float:
        """The part of the KV cache that running sequences need."""
        return max(0, self.kv_used_tokens - self.kv_idle_tokens) / max(1, self.kv_tokens)

    @property
    def utilization(self) -> float:
        """What is asked of it, of what it can do at a time: 0 idle, 1 full, above 1 requests wait."""
        return max((self.running + self.waiting) / max(1, self.slots), self.kv_utilization)


@dataclasses.dataclass(frozen=True, slots=True)
class ServerLoad:
    """The loaded models, by name."""

    models: Sequence[ModelLoad] = ()

    @property
    def utilization(self) -> float:
        """The highest of the models'."""
        return max((model.utilization for model in self.models), default=0.0)


class LoadMeter:
    """Reads the load. Event loop only; nothing is done while nobody asks."""

    def __init__(self, shelf: Shelf, clock: Callable[[], float] = time.monotonic) -> None:
        self._shelf = shelf
        self._clock = clock
        self._closed = asyncio.Event()
        self._memory: Mapping[ModelExecutor, int] = {}
        self._memory_read_s = 0.0
        self._reading: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Ends everybody's `every` and `ticks`, those to come included."""
        self._closed.set()

    async def read(self) -> ServerLoad:
        """The load now, with the memory of processes as it was a few seconds ago at most."""
        is_old = self._clock() - self._memory_read_s >= MEMORY_FRESH_S
        if is_old or not self._memory.keys() >= set(self._executors()):
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read_memory())
            await asyncio.shield(self._reading)  # who leaves does not end it for the others
        loads = (load_of(entry, self._memory) for entry in self._shelf.list())
        return ServerLoad([load for load in loads if load is not None])

    async def every(self, interval_s: float) -> AsyncGenerator[ServerLoad, None]:
        """The load now and after each interval, until `close`."""
        async with aclosing(self.ticks(interval_s)) as ticks:
            async for _ in ticks:
                yield await self.read()

    async def ticks(self, interval_s: float) -> AsyncGenerator[None, None]:
        """Now and after each interval, until `close`."""
        while not self._closed.is_set():
            yield
            try:
                async with asyncio.timeout(interval_s):
                    await self._closed.wait()
            except TimeoutError:
                continue

    def _executors(self) -> list[ModelExecutor]:
        return [entry.executor for entry in self._shelf.list() if entry.executor is not None]

    async def _read_memory(self) -> None:
        self._memory = await memory_of(self._executors())
        self._memory_read_s = self._clock()


def load_of(entry: ModelEntry, memory: Mapping[ModelExecutor, int]) -> ModelLoad | None:
    """The load of one model, None if it is not loaded; `memory` are the bytes of processes."""
    executor, options = entry.executor, entry.ready.options if entry.ready else entry.asked
    if executor is None or not (entry.ready or executor.in_flight):
        return None  # its first load
    stats, rates = executor.stats, executor.rates.read()
    return ModelLoad(
        name=entry.name,
        running=stats.running,
        waiting=max(0, executor.in_flight - stats.running),
        waiting_tokens=stats.waiting_tokens,
        slots=options.max_sequences or 0,
        kv_used_tokens=stats.kv_used_tokens,
        kv_idle_tokens=stats.kv_idle_tokens,
        kv_tokens=options.kv_cache_tokens or 0,
        prefill_rate=rates.prefill,
        decode_rate=rates.decode,
        memory_bytes=memory.get(executor, 0),
    )
