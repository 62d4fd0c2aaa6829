"""How quickly places in a queue become free, and when one who was refused may come again.

Pure: it is told how much time has passed, and reads no clock.
"""

from __future__ import annotations

import math

# What lies so far back counts 1/e.
MEMORY_S = 30.0
LEAST_RETRY_S, MOST_RETRY_S = 0.1, 60.0
# Between two that are told to come again, at most.
MOST_APART_S = 5.0


class Outflow:
    """What leaves a queue per second, in requests, tokens or whatever its places are counted in.

    The amount that has left divided by the time in which something waited, both forgotten exponentially: time
    in which nobody waits does not pass.
    """

    def __init__(self, assumed_per_s: float) -> None:
        """`assumed_per_s` counts as if measured for one second; it is forgotten like the rest."""
        self.is_measured = False
        self._left, self._seconds = assumed_per_s, 1.0
        self._due_s = -math.inf

    def add(self, left: float, seconds: float) -> None:
        """So much has left in the next `seconds`, in all of which something waited."""
        self.is_measured = self.is_measured or left > 0
        lost = -math.expm1(-seconds / MEMORY_S)
        self._left += left - self._left * lost
        self._seconds += (MEMORY_S - self._seconds) * lost

    def seconds(self, amount: float) -> float:
        """How long it takes until so much more has left; infinite if nothing leaves."""
        return amount * self._seconds / self._left if self._left > 0 else math.inf

    def retry_s(self, missing: float, amount: float, now: float) -> float:
        """When one that was just refused may come again, in seconds from `now`: at a time of its own.

        `missing` has to leave before there is room for it, and `amount` is what it takes up itself. Times are
        given as in the virtual scheduling of the generic cell rate algorithm (ITU-T I.371, annex A): each is
        as much later than the last one as a place takes to become free. Beyond the longest time, the
        second half of it is given out again.
        """
        first_s = now + min(self.seconds(missing), MOST_RETRY_S - MOST_APART_S)
        due_s = max(first_s, self._due_s + min(self.seconds(amount), MOST_APART_S))
        if due_s > now + MOST_RETRY_S:
            due_s = max(first_s, now + MOST_RETRY_S / 2)
        self._due_s = due_s
        return min(max(due_s - now, LEAST_RETRY_S), MOST_RETRY_S)
