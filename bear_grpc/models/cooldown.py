"""Pauses after loads that failed, so that a model which cannot be loaded does not take the machine.

A load counts once its worker was started and failed in a way that may pass. A
file that is gone or is no model, or options that are wrong, are told at once.
"""

from __future__ import annotations

import dataclasses

from .clock import Clock

FIRST_S = 10.0
LONGEST_S = 300.0


@dataclasses.dataclass(slots=True)
class _Failures:
    pause_s: float
    until_s: float


class Cooldown:
    """The pauses by model: 10 s, doubling to 5 min, forgotten with a success. Event loop only."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: dict[str, _Failures] = {}

    def failed(self, name: str) -> float:
        """A load has failed; the seconds of the pause that begins."""
        before = self._failures.get(name)
        pause_s = FIRST_S if before is None else min(2 * before.pause_s, LONGEST_S)
        self._failures[name] = _Failures(pause_s, self._clock.now() + pause_s)
        return pause_s

    def forget(self, name: str) -> None:
        """A load has succeeded, or the model has another file: the next pause is a first one."""
        self._failures.pop(name, None)

    def left_s(self, name: str) -> float:
        """Seconds of the pause that are left, 0 if there is none."""
        found = self._failures.get(name)
        return 0.0 if found is None else max(0.0, found.until_s - self._clock.now())
