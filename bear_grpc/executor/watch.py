"""When a worker counts as stuck: the same step for too long, or no sign of life."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol import Heartbeat

CHECK_S = 0.5
# A step may take ten times what was predicted, but this long at least.
LEAST_STEP_S, STEP_FACTOR = 10.0, 10.0
# Checks come every CHECK_S: if one comes so late, it was the server that stood still.
LATE_CHECK_S = 2.0


class Watch:
    """One worker's heartbeats. `clock` gives seconds that never go back. Event loop only."""

    def __init__(self, clock: Callable[[], float], heartbeat_timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = heartbeat_timeout_s
        self._seen_s = self._checked_s = clock()
        self._last: Heartbeat | None = None

    def beat(self, frame: Heartbeat) -> None:
        """A heartbeat has come."""
        self._last, self._seen_s = frame, self._clock()

    def overdue(self) -> str | None:
        """What is wrong, None if nothing is; to be asked every CHECK_S."""
        now = self._clock()
        if now - self._checked_s > LATE_CHECK_S:
            # What the worker has sent meanwhile lies unread.
            self._seen_s = now
        self._checked_s = now
        if now - self._seen_s > self._timeout_s:
            return f"no sign of life for {now - self._seen_s:.1f} s"
        last = self._last
        if last is not None and last.step_age_s > max(LEAST_STEP_S, STEP_FACTOR * last.predicted_s):
            expected = f"{last.predicted_s:.3f} s were expected"
            return f"step {last.step} has run for {last.step_age_s:.1f} s, {expected}"
        return None
