"""Refused calls in the audit log: a few of each caller are told one by one, the others by their number."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

import msgspec

from .audit import Entry

TOLD = 10  # of a caller, within a window that begins with the first of them
WINDOW_S = 60.0
# Callers with a window of their own; what others are refused is only counted, for all of them together.
MAX_CALLERS = 1000
ACTION = "Refused"
_OTHERS = ("", "")


@dataclasses.dataclass(slots=True)
class _Window:
    began_s: float
    told: int = 0
    untold: int = 0
    last: Entry | None = None


class Refusals:
    """Decides which are written as they come; any thread.

    What was counted is told when its window has ended and `due` is asked; until then the window stays.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[tuple[str, str], _Window] = {}

    def is_told(self, entry: Entry, *, has_room: bool = True) -> bool:
        """Whether it gets a line of its own; else, and without room for one, it is counted."""
        now_s, caller = self._clock(), (entry.actor, entry.tenant)
        with self._lock:
            if caller not in self._windows and len(self._windows) >= MAX_CALLERS:
                caller = _OTHERS
                entry = msgspec.structs.replace(entry, actor="", tenant="", peer="")
            window = self._windows.get(caller)
            if window is None or (not window.untold and now_s - window.began_s >= WINDOW_S):
                window = self._windows[caller] = _Window(now_s)
            if has_room and caller != _OTHERS and window.told < TOLD:
                window.told += 1
                return True
            window.untold += 1
            window.last = entry
            return False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to wait for."""
        with self._lock:
            return not self._windows

    def due(self, *, at_once: bool = False) -> list[Entry]:
        """A line for each caller whose window has ended, or for each, that tells how many were counted.

        It has code and reason of the last of them.
        """
        now_s = self._clock()
        with self._lock:
            ended = {
                caller: window
                for caller, window in self._windows.items()
                if at_once or now_s - window.began_s >= WINDOW_S
            }
            for caller in ended:
                del self._windows[caller]
        return [
            msgspec.structs.replace(
                window.last,
                action=ACTION,
                subjects=(),
                count=window.untold,
                duration_s=round(now_s - window.began_s, 3),
            )
            for window in ended.values()
            if window.last is not None
        ]
