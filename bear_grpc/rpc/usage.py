"""Counts what every call of inference uses, for the record."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..access.usage import Group, Totals, UsageError, UsageStore, day_of
from .call import Call

log = logging.getLogger(__name__)

# A crash loses what was counted for so long at most.
PERIOD_S = 1.0
# What is still to be written at the end gets so long: more than another process may hold the file.
CLOSE_S = 10.0
# Sums of different keys, models and days that wait for a disk that cannot be written.
MAX_WAITING = 10_000
_COUNTED = "/bear_grpc.v1.InferenceService/"
# How a call ends that nobody has failed.
_NO_ERRORS = ("OK", "CANCELLED")


class UsageObserver:
    """A call observer. Its own thread writes, about every second; what cannot be written waits.

    Calls without a valid key are left out. The model is told of calls that got one, so that names that a
    client makes up take no room.
    """

    def __init__(self, state_dir: Path, keep_days: int, wall: Callable[[], float] = time.time) -> None:
        """Days are kept for `keep_days`, today included. `wall` gives seconds since 1970."""
        self._store = UsageStore(state_dir)
        self._keep_days = keep_days
        self._wall = wall
        self._lock = threading.Lock()
        self._waiting: dict[Group, Totals] = {}
        self._has_more = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._pruned = ""
        self._problem = ""
        self._is_losing = False

    def begin(self, call: Call) -> None:
        """Nothing: what it uses is not known."""

    def end(self, call: Call) -> None:
        """Counts it, on the day of its end."""
        if not call.method.startswith(_COUNTED) or not call.is_known:
            return
        model = call.model if call.ready_s else ""
        used = Totals(
            requests=1,
            prompt_tokens=call.usage.prompt_tokens,
            cached_tokens=call.usage.cached_tokens,
            completion_tokens=call.drawn_tokens,
            errors=call.code not in _NO_ERRORS,
        )
        with self._lock:
            self._add(Group(day_of(self._wall()), call.caller.id, model), used)
        if self._thread is None:
            self._thread = self._started()
        self._has_more.set()

    def tokens_today(self) -> dict[str, int]:
        """The tokens that were used today, by key; blocks. None are known of a file that cannot be read."""
        try:
            return self._store.tokens_on(day_of(self._wall()))
        except UsageError as exc:
            log.error("what was used today is not known, quotas of the day begin anew: %s", exc)
            return {}

    def flush(self) -> bool:
        """Writes what has been counted; blocks. False if it waits for the next time. One thread at a time."""
        with self._lock:
            taken, self._waiting = self._waiting, {}
        now_s = self._wall()
        today = day_of(now_s)
        try:
            if taken:
                self._store.add(taken, now_s if today != self._pruned else None, self._keep_days)
        except Exception as exc:
            with self._lock:
                for group, totals in taken.items():
                    self._add(group, totals)
            if str(exc) != self._problem:  # once, not every second
                log.error("usage cannot be written, it is kept in memory: %s", exc)
            self._problem = str(exc)
            return False
        if self._problem:
            log.info("usage is written again")
        self._is_losing = False
        self._problem, self._pruned = "", today if taken else self._pruned
        return True

    def close(self) -> None:
        """Returns when all is written, or cannot be within CLOSE_S; blocks. For after the last call."""
        self._closing.set()
        self._has_more.set()
        thread = self._thread or self._started()
        self._thread = None
        thread.join(CLOSE_S)
        if thread.is_alive():
            log.error("usage of the last calls is lost: the disk does not answer")

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._follow, name="usage", daemon=True)
        thread.start()
        return thread

    def _follow(self) -> None:
        while not self._closing.is_set():
            self._has_more.wait()
            self._closing.wait(PERIOD_S)
            self._has_more.clear()
            if not self.flush():
                self._has_more.set()
        if not self.flush():
            log.error("usage of the last calls is lost")
        self._store.close()

    def _add(self, group: Group, totals: Totals) -> None:
        """With the lock."""
        if group not in self._waiting and len(self._waiting) >= MAX_WAITING:
            if not self._is_losing:
                self._is_losing = True
                log.error("usage is not counted any more for want of room; it cannot be written")
            return
        self._waiting[group] = self._waiting.get(group, Totals()).plus(totals)
