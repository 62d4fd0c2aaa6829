"""Tokens per second, from counters that a worker sends now and then."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import NamedTuple

WINDOW_S = 5.0
# A window that has just begun would tell of a single step.
SHORTEST_S = 1.0


class Rates(NamedTuple):
    """Tokens per second over the last WINDOW_S."""

    prefill: float
    decode: float


class TokenRates:
    """The counters of one worker after another. Event loop only.

    Costs an append for each report; nothing while the worker is silent.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        # Time, prompt tokens, completion tokens; the first is the last one before the window.
        self._seen: collections.deque[tuple[float, int, int]] = collections.deque()
        self.restart()

    def restart(self) -> None:
        """A new worker counts from 0."""
        self._seen.clear()
        self._seen.append((self._clock(), 0, 0))

    def add(self, prefill_tokens: int, decode_tokens: int) -> None:
        """What the worker has counted up to now."""
        now = self._clock()
        self._forget(now)
        self._seen.append((now, prefill_tokens, decode_tokens))

    def read(self) -> Rates:
        """The rates up to now."""
        now = self._clock()
        self._forget(now)
        began_s, prefill, decode = self._seen[0]
        _, prefill_now, decode_now = self._seen[-1]
        elapsed_s = min(WINDOW_S, max(SHORTEST_S, now - began_s))
        return Rates((prefill_now - prefill) / elapsed_s, (decode_now - decode) / elapsed_s)

    def _forget(self, now: float) -> None:
        while len(self._seen) > 1 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()
