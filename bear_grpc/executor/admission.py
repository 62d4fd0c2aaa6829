"""Whether a queue takes more, and when it may again. Event loop only."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import QueueFull
from ..outflow import Outflow


class Admission:
    """The bound of one queue. Whoever keeps the queue adds to `outflow` what has left it."""

    def __init__(
        self,
        name: str,
        limit: int,
        *,
        unit: str = "requests",
        assumed_per_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` is the model's, `unit` what is counted; `assumed_per_s` leave it as long as none has."""
        self.outflow = Outflow(assumed_per_s)
        self._name = name
        self._limit = limit
        self._unit = unit
        self._clock = clock

    def check(self, waiting: int, asked: int = 1) -> None:
        """Raises QueueFull if `asked` more are too many. An empty queue takes any number."""
        if not waiting or waiting + asked <= self._limit:
            return
        missing = min(waiting, waiting + asked - self._limit)
        retry_s = self.outflow.retry_s(missing, asked, self._clock())
        raise QueueFull(self._name, self._limit, retry_s, unit=self._unit, waiting=waiting, asked=asked)
