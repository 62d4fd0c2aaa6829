"""A bound on the bytes per second of all downloads together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimiter:
    """Gives each chunk its time. Any thread, several at once.

    `clock` and `wait` are the machine's unless a test says otherwise; `wait` takes an event and seconds.
    """

    def __init__(
        self,
        bytes_per_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        """`bytes_per_s` 0 is no bound."""
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._next = clock()

    def set_rate(self, bytes_per_s: float) -> None:
        """Another bound from the next chunk on; 0 is none."""
        with self._lock:
            self._bytes_per_s = bytes_per_s
            self._next = self._clock()

    def take(self, count: int, stop: threading.Event) -> None:
        """Waits until `count` bytes more are within the rate, or until `stop` is set."""
        with self._lock:
            if self._bytes_per_s <= 0:
                return
            now = self._clock()
            # Time that nobody used is gone: no burst makes up for it.
            self._next = max(self._next, now) + count / self._bytes_per_s
            delay = self._next - now
        self._wait(stop, delay)
