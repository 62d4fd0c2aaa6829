"""Calls that wait for their model to come: as many as may wait for a slot of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from ..executor.admission import Admission


@dataclasses.dataclass(slots=True)
class _Queue:
    admission: Admission
    waiting: int = 0


class Arrivals:
    """One bounded queue for each model that is downloaded, loaded or started again. Event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queues: dict[str, _Queue] = {}

    def set_limit(self, limit: int) -> None:
        """Bounds what comes from now on."""
        self._limit = limit
        for queue in self._queues.values():
            queue.admission.limit = limit

    @contextmanager
    def wait(self, name: str, ahead: int = 0) -> Iterator[None]:
        """A call that waits for a model, behind `ahead` that its executor has already. Raises QueueFull."""
        queue = self._queues.setdefault(name, _Queue(Admission(name, self._limit)))
        queue.admission.check(queue.waiting + ahead)
        queue.waiting += 1
        try:
            yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                del self._queues[name]
