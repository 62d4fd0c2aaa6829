"""What becomes of requests when their worker dies: who goes on, who runs alone, who ends."""

from __future__ import annotations

import dataclasses
import time

import msgspec

from ..errors import BearError, RequestQuarantined, WorkerCrashed
from ..protocol import Submit
from .crash import CrashReport
from .generation import Generation

# In the failing step of so many native faults a request is a suspect, and runs alone.
SUSPECT_FAULTS = 2


@dataclasses.dataclass(slots=True, eq=False)
class _Request:
    generation: Generation
    submit: Submit
    fail_on_restart: bool
    is_sent: bool = False
    restarts: int = 0
    faults: int = 0

    @property
    def is_suspect(self) -> bool:
        return self.faults >= SUSPECT_FAULTS

    def was_at_work(self, report: CrashReport) -> bool:
        ids = self.generation.ids
        return report.suspects.text_job in ids or any(id in ids for id in report.suspects.sequences)


class Recovery:
    """The requests of one model, in the order in which they came. Event loop only.

    Frames are given out while a worker lives; while there are suspects, only those of one of them.
    """

    def __init__(self, name: str, max_restarts: int) -> None:
        """`max_restarts` is how often a request is taken up again."""
        self._name = name
        self._max_restarts = max_restarts
        self._requests: dict[Generation, _Request] = {}
        self._is_live = False

    def add(self, generation: Generation, submit: Submit, *, fail_on_restart: bool) -> list[Submit]:
        """Takes a request; gives the frames to send now."""
        self._requests[generation] = _Request(generation, submit, fail_on_restart)
        return self.release()

    def remove(self, generation: Generation) -> list[Submit]:
        """All answers of a request have ended; gives the frames to send now."""
        self._requests.pop(generation, None)
        return self.release()

    def is_sent(self, generation: Generation) -> bool:
        """Whether the worker knows it."""
        request = self._requests.get(generation)
        return request is not None and request.is_sent

    def open(self) -> list[Submit]:
        """A worker is ready; gives the frames to send now."""
        self._is_live = True
        return self.release()

    def release(self) -> list[Submit]:
        """The frames that may go now."""
        if not self._is_live:
            return []
        suspects = [request for request in self._requests.values() if request.is_suspect]
        frames: list[Submit] = []
        for request in suspects[:1] or self._requests.values():
            if not request.is_sent:
                request.is_sent = True
                frames += request.generation.submits(request.submit)
        return frames

    def close(self, report: CrashReport) -> list[tuple[Generation, BearError]]:
        """The worker has died: who ends of it, and how. The others are sent again after `open`."""
        self._is_live = False
        ends: list[tuple[Generation, BearError]] = []
        for request in self._requests.values():
            was_sent, request.is_sent = request.is_sent, False
            if was_sent:
                request.submit = msgspec.structs.replace(request.submit, was_taken=True)
            error = self._judge(request, report, was_sent)
            if error is not None:
                ends.append((request.generation, error))
        return ends

    def _judge(self, request: _Request, report: CrashReport, was_sent: bool) -> BearError | None:
        was_at_work = was_sent and request.was_at_work(report)
        if was_at_work and report.is_native_fault:
            if request.is_suspect:
                return RequestQuarantined(report.cause)
            request.faults += 1
        crashed = WorkerCrashed(self._name, report.cause)
        if request.fail_on_restart or (was_at_work and report.is_text_stuck):
            return crashed
        if was_at_work or (was_sent and request.generation.has_started):
            request.restarts += 1
            request.generation.restarts_s.append(time.monotonic())
        return crashed if request.restarts > self._max_restarts else None
