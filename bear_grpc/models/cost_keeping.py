"""Step times that workers measure, on their way to the disk."""

from __future__ import annotations

import asyncio
import logging

from ..types import CostTable
from .costs import CostStore, is_sound
from .entry import ModelEntry

log = logging.getLogger(__name__)


class CostKeeper:
    """Files follow each other in the order of the measurements. Event loop only."""

    def __init__(self, costs: CostStore) -> None:
        self._costs = costs
        self._writing: dict[ModelEntry, asyncio.Task[None]] = {}

    async def read(self, entry: ModelEntry) -> list[CostTable]:
        """What has been measured of a model's file."""
        return await asyncio.to_thread(self._costs.read, entry.file)

    def take(self, entry: ModelEntry, tables: list[CostTable]) -> None:
        """Takes what a worker has measured; on the disk it replaces what was there."""
        if not all(map(is_sound, tables)):
            log.warning("the worker of %s sent step times that are none", entry.name)
            return
        entry.cost_tables = tables
        if entry not in self._writing:
            self._writing[entry] = asyncio.create_task(self._write(entry))

    async def close(self) -> None:
        """Returns when all is written."""
        await asyncio.gather(*self._writing.values())

    async def _write(self, entry: ModelEntry) -> None:
        """Writes until what is written is what is known."""
        written: list[CostTable] | None = None
        try:
            while written is not entry.cost_tables and entry.path is not None:
                written = entry.cost_tables
                await asyncio.to_thread(self._costs.write, entry.path, written)
        finally:
            del self._writing[entry]
