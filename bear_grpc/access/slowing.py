"""Failures of authentication are counted by host, and the more there are the later they are answered."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

FREE_FAILURES = 5  # of a host: a person who mistypes waits for nothing
WINDOW_S = 60.0  # without a failure, after which a host starts anew
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 5.0
MAX_HOSTS = 4096


class Failures:
    """Event loop only. Hosts beyond MAX_HOSTS push out those that failed longest ago."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hosts: collections.OrderedDict[str, tuple[int, float]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._hosts)

    def count(self, host: str) -> float:
        """Counts a failure of `host`; gives the seconds that its answer has to wait."""
        now_s = self._clock()
        count, last_s = self._hosts.pop(host, (0, now_s))
        count = 1 if now_s - last_s > WINDOW_S else count + 1
        self._hosts[host] = (count, now_s)
        if len(self._hosts) > MAX_HOSTS:
            self._hosts.popitem(last=False)
        if count <= FREE_FAILURES:
            return 0.0
        doublings = min(count - FREE_FAILURES - 1, 16)
        return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0**doublings)
