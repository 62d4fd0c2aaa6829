"""Room in memory for a model that is to be loaded: idle models make way."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from ..errors import InsufficientMemory
from ..types import LoadOptions
from .entry import ModelEntry


@dataclasses.dataclass(slots=True, frozen=True)
class Need:
    """What a load takes of the host's memory, and what is free there now.

    `gpu_layers` is what was planned for, None where there is no GPU.
    """

    needed_bytes: int
    free_bytes: int
    gpu_layers: int | None = None


Plan = Callable[[ModelEntry, LoadOptions], Awaitable[Need]]


class Room:
    """Finds room for one load at a time; keeps account of what loads under way have not taken yet.

    Event loop only.
    """

    def __init__(
        self,
        plan: Plan | None,
        *,
        longest_idle: Callable[[], ModelEntry | None],
        evict: Callable[[ModelEntry, str], Awaitable[object]],
    ) -> None:
        """`longest_idle` gives the next model to go, None if all are needed; `evict` unloads it, and why.

        Without a `plan` there is room for everything.
        """
        self._plan = plan
        self._longest_idle = longest_idle
        self._evict = evict
        self._turn = asyncio.Lock()
        self._promised: dict[ModelEntry, int] = {}

    @asynccontextmanager
    async def kept_for(self, entry: ModelEntry) -> AsyncIterator[None]:
        """Room for a model while it is being loaded. Raises InsufficientMemory, and what the plan raises."""
        if self._plan is not None:
            async with self._turn:
                await self._make(entry, self._plan)
        try:
            yield
        finally:
            self._promised.pop(entry, None)

    async def _make(self, entry: ModelEntry, plan: Plan) -> None:
        while True:
            # Read before the plan is made: what is taken in between counts twice, never not at all.
            promised = await self._promised_bytes()
            need = await plan(entry, entry.asked)
            free_bytes = max(0, need.free_bytes - promised)
            if need.needed_bytes <= free_bytes:
                self._promised[entry] = need.needed_bytes
                entry.asked = LoadOptions(gpu_layers=need.gpu_layers).over(entry.asked)
                return
            victim = self._longest_idle()
            if victim is None:
                raise InsufficientMemory(entry.name, need.needed_bytes, free_bytes)
            why = f"{entry.name} needs {need.needed_bytes} bytes, {free_bytes} are free"
            # It goes on when this load is given up.
            await asyncio.shield(self._evict(victim, why))

    async def _promised_bytes(self) -> int:
        """What loads under way will still take."""
        left = 0
        for entry, needed_bytes in list(self._promised.items()):
            left += max(0, needed_bytes - await asyncio.to_thread(_held_bytes, entry))
        return left


def _held_bytes(entry: ModelEntry) -> int:
    executor = entry.executor
    return executor.memory_bytes if executor is not None else 0
