"""When a worker counts as stuck: the same step for too long, or no sign of life."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol import Heartbeat

CHECK_S = 0.25
# A step may take ten times what was predicted, but this long at least.
LEAST_STEP_S, STEP_FACTOR = 10.0, 10.0
# Checks come every CHECK_S: if one comes so late, or before the last one, it was the server that
# stood still, or its machine, or the clock that jumped. Nobody can tell how long the worker ran then.
LATE_CHECK_S = 2.0


class Watch:
    """One worker's heartbeats. `clock` gives seconds; nobody is stuck because it jumps. Event loop only."""

    def __init__(
        self, clock: Callable[[], float], heartbeat_timeout_s: float, startup_timeout_s: float
    ) -> None:
        """`startup_timeout_s` is how long it may be silent before `has_started`."""
        self._clock = clock
        self._timeout_s = heartbeat_timeout_s
        self._silence_s = max(startup_timeout_s, heartbeat_timeout_s)
        self._read_s = clock()
        # Of the time that has passed while the server ran.
        self._now_s = self._seen_s = self._step_s = 0.0
        self._last: Heartbeat | None = None

    def has_started(self) -> None:
        """Its libraries are there, whose loading may hold up all of its threads."""
        self._silence_s = self._timeout_s

    def beat(self, frame: Heartbeat) -> None:
        """A heartbeat has come."""
        self._pass_time()
        if self._last is None or frame.step != self._last.step:
            self._step_s = self._now_s - min(frame.step_age_s, CHECK_S)
        self._last, self._seen_s = frame, self._now_s

    def overdue(self) -> str | None:
        """What is wrong, None if nothing is; to be asked every CHECK_S."""
        self._pass_time()
        silent_s = self._now_s - self._seen_s
        if silent_s > self._silence_s:
            return f"no sign of life for {silent_s:.1f} s"
        last = self._last
        if last is None:
            return None
        # The worker's own clock may have jumped, too, or it stood still with the server.
        age_s = min(last.step_age_s, self._now_s - self._step_s)
        if age_s > max(LEAST_STEP_S, STEP_FACTOR * last.predicted_s):
            return f"step {last.step} has run for {age_s:.1f} s, {last.predicted_s:.3f} s were expected"
        return None

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._read_s = now - self._read_s, now
        if 0 <= passed <= LATE_CHECK_S:
            self._now_s += passed
        else:
            self._seen_s = self._now_s  # what the worker has sent meanwhile lies unread
