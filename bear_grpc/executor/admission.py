"""Whether a queue takes more, and when it may again. Event loop only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ..bound import missing
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
        self.limit = limit  # may change
        self._unit = unit
        self._clock = clock

    def check(
        self,
        waiting: int,
        asked: int = 1,
        tenant: str = "",
        held: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """Raises QueueFull if `asked` more of `tenant` are too many; `held` tells how many each has."""
        over = missing(self.limit, waiting, asked, tenant, held)
        if not over:
            return
        retry_s = self.outflow.retry_s(over, asked, self._clock())
        raise QueueFull(self._name, self.limit, retry_s, unit=self._unit, waiting=waiting, asked=asked)
