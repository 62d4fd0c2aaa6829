"""Text jobs under way: each is answered, and asked once more if its worker dies."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from ..errors import BearError, RequestQuarantined, WorkerCrashed
from ..protocol import TextJob, TextResult
from .admission import Admission
from .crash import CrashReport

# Jobs that are done per second, as long as none has been.
ASSUMED_PER_S = 100.0


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    job: TextJob
    future: asyncio.Future[TextResult]
    deaths: int = 0
    faults: int = 0


class Texts:
    """The jobs of one model. Event loop only."""

    def __init__(self, name: str, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `limit` jobs wait."""
        self._name = name
        self._clock = clock
        self.admission = Admission(name, limit, unit="texts", assumed_per_s=ASSUMED_PER_S, clock=clock)
        self._since_s = 0.0  # when the last one ended, or the first one came
        self._waiting: dict[int, _Waiting] = {}

    def add(self, job: TextJob) -> asyncio.Future[TextResult]:
        """The future answer of a job; `remove` it in any case. Raises QueueFull."""
        self.admission.check(len(self._waiting))
        if not self._waiting:
            self._since_s = self._clock()
        future: asyncio.Future[TextResult] = asyncio.get_running_loop().create_future()
        self._waiting[job.id] = _Waiting(job, future)
        return future

    def remove(self, job: TextJob) -> None:
        """Nobody waits for it any more."""
        del self._waiting[job.id]
        now = self._clock()
        self.admission.outflow.add(1, now - self._since_s)
        self._since_s = now

    async def settle(self) -> None:
        """Waits until those under way now have ended."""
        if self._waiting:
            await asyncio.wait([waiting.future for waiting in self._waiting.values()])

    def take(self, result: TextResult) -> None:
        """The worker's answer."""
        waiting = self._waiting.get(result.id)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_result(result)

    def jobs(self) -> list[TextJob]:
        """What a new worker is asked."""
        return [waiting.job for waiting in self._waiting.values() if not waiting.future.done()]

    def close(self, report: CrashReport) -> None:
        """The worker has died: ends the jobs that have had their second try, or stopped it."""
        for waiting in self._waiting.values():
            waiting.deaths += 1
            at_work = report.suspects.text_job == waiting.job.id
            waiting.faults += at_work and report.is_native_fault
            if waiting.deaths > 1 or (at_work and report.is_text_stuck):
                error = RequestQuarantined(report.cause) if waiting.faults > 1 else None
                _fail(waiting, error or WorkerCrashed(self._name, report.cause))

    def fail(self, error: BearError) -> None:
        """Ends all of them."""
        for waiting in self._waiting.values():
            _fail(waiting, error)


def _fail(waiting: _Waiting, error: BearError) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(error)
