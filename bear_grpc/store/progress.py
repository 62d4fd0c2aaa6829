"""How far a download is, told often enough to watch and seldom enough to cost nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..types import PullProgress, PullStage

INTERVAL_S = 0.2
WINDOW_S = 5.0


class Meter:
    """Turns bytes into progress with a rate and a prediction. One thread only."""

    def __init__(
        self, total_bytes: int, on_progress: Callable[[PullProgress], None], clock: Callable[[], float]
    ) -> None:
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()
        self._stage: PullStage | None = None
        self._told: float | None = None
        self._last: PullProgress | None = None

    def tell(self, stage: PullStage, completed_bytes: int, *, at_once: bool = False) -> None:
        """Tells the progress unless it was told a moment ago; a new stage and `at_once` are always told."""
        now = self._clock()
        is_new = stage is not self._stage
        if self._told is not None and not is_new and not at_once and now - self._told < INTERVAL_S:
            return
        if is_new or (self._samples and completed_bytes < self._samples[-1][1]):
            self._samples.clear()
        self._stage, self._told = stage, now
        self._samples.append((now, completed_bytes))
        while now - self._samples[0][0] > WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()
        began, before = self._samples[0]
        rate = (completed_bytes - before) / (now - began) if now > began else 0.0
        remaining = (self._total_bytes - completed_bytes) / rate if rate > 0 else 0.0
        progress = PullProgress(stage, completed_bytes, self._total_bytes, rate, remaining)
        if progress != self._last:
            self._last = progress
            self._on_progress(progress)

    def restart(self) -> None:
        """Bytes that were here already are about to count: they are no part of the rate."""
        self._samples.clear()
