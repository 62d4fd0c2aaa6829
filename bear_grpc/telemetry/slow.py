"""What takes too long to be read at a scrape: it is read in the background, and told as it was then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ..errors import BearError
from ..protocol import DeviceInfo
from . import families
from .model_metrics import Value, grouped
from .series import Taken

log = logging.getLogger(__name__)

# A worker's memory is told by the kernel, which walks all its pages for it; of a GPU's, a process that
# is started for the question.
FRESH_S = 10.0


class SlowReadings:
    """Event loop only."""

    def __init__(
        self,
        memory: Callable[[], Awaitable[Mapping[str, int]]],
        devices: Callable[[], Awaitable[Sequence[DeviceInfo]]] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory` reads what each model's worker holds, by model; `devices` reads all devices."""
        self._memory = memory
        self._devices = devices
        self._clock = clock
        self._read_s: float | None = None
        self._values: list[Value] = []
        self._reading: asyncio.Task[None] | None = None

    def taken(self) -> list[Taken]:
        """What was read last; if that is old, it is read anew for the next time."""
        is_fresh = self._read_s is not None and self._clock() - self._read_s < FRESH_S
        if self._reading is None and not is_fresh:
            self._reading = asyncio.create_task(self.read())
            self._reading.add_done_callback(self._done)
        return grouped(self._values, (families.WORKER_MEMORY, families.DEVICE_FREE, families.DEVICE_TOTAL))

    async def read(self) -> None:
        """Reads everything now."""
        values: list[Value] = [
            (families.WORKER_MEMORY, (name,), size) for name, size in (await self._memory()).items() if size
        ]
        try:
            found = await self._devices() if self._devices is not None else ()
        except BearError as exc:
            log.warning("the devices' memory cannot be read: %s", exc)
            found = ()
        for device in found:
            if device.kind != "cpu":
                values.append((families.DEVICE_FREE, (device.name,), device.free_bytes))
                values.append((families.DEVICE_TOTAL, (device.name,), device.total_bytes))
        self._values, self._read_s = values, self._clock()

    async def close(self) -> None:
        """Ends what is being read."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    def _done(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._read_s = self._clock()  # not at every scrape
            log.error("memory cannot be read", exc_info=error)
