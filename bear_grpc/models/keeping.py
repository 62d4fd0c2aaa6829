"""How long loaded models are kept: who uses them, and when an idle one goes."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable

from .clock import Clock, Timer
from .entry import ModelEntry

# A caller that takes the executor without telling its end: jobs of the text thread take seconds at most.
HOLD_S = 10.0
# What still runs without a use, such as a cancelled sequence on its way out.
RECHECK_S = 1.0
# From here on it is for ever: the calendar ends, too.
MAX_KEEP_ALIVE_S = 1e9


@dataclasses.dataclass(slots=True)
class _Life:
    uses: int = 0
    used_s: float = 0.0
    # How long it is kept after the last use, as that one said; None: the model's own time.
    keep_alive_s: float | None = None
    timer: Timer | None = None


class KeepAlive:
    """Counts the uses of each model and times its rest. Event loop only.

    The rest begins with the end of the last use and ends with the beginning of
    the next one, however late that comes: a use wins over the timer as long as
    this has not fired.
    """

    def __init__(self, clock: Clock, on_expired: Callable[[ModelEntry], None]) -> None:
        """`on_expired` gets a model that is READY and has rested for its time."""
        self._clock = clock
        self._on_expired = on_expired
        self._lives: dict[ModelEntry, _Life] = {}
        self._holds: set[Timer] = set()
        self._closed = False

    def begin(self, entry: ModelEntry) -> None:
        """A use begins: one that waits for the load of the model counts, too."""
        life = self._life(entry)
        life.uses += 1
        self._stop_timer(entry, life)

    def end(self, entry: ModelEntry, keep_alive_s: float | None = None) -> None:
        """A use ends; `keep_alive_s` is how long the model is kept after it, None: the model's own time."""
        self._life(entry).keep_alive_s = keep_alive_s
        self._leave(entry)

    def hold(self, entry: ModelEntry, seconds: float) -> None:
        """A use whose end nobody will tell. A use that ends within it says how long the model is kept."""
        self.begin(entry)

        def end() -> None:
            self._holds.discard(timer)
            self._leave(entry)

        timer = self._clock.call_later(seconds, end)
        self._holds.add(timer)

    def rest(self, entry: ModelEntry) -> None:
        """Begins the rest anew: it has been loaded, or its time has changed.

        A time of 0 waits for the first use: nobody loads a model for nothing.
        """
        life = self._life(entry)
        life.used_s = self._clock.now()
        if life.uses == 0:
            self._stop_timer(entry, life)
            if entry.keep_alive_s > 0:
                self._start_timer(entry, life, entry.keep_alive_s)

    def stop(self, entry: ModelEntry) -> None:
        """It is not loaded any more: nothing is timed. Uses go on until their callers end them."""
        life = self._lives.get(entry)
        if life is not None:
            self._stop_timer(entry, life)
            if life.uses == 0:
                del self._lives[entry]

    def is_busy(self, entry: ModelEntry) -> bool:
        """Whether a request runs on it or waits for it."""
        in_use = entry in self._lives and self._lives[entry].uses > 0
        return in_use or (entry.executor is not None and entry.executor.in_flight > 0)

    def used_s(self, entry: ModelEntry) -> float:
        """When it was used the last time, or loaded, by the clock."""
        return self._life(entry).used_s

    def close(self) -> None:
        """No timer fires from now on."""
        self._closed = True
        for timer in self._holds:
            timer.cancel()
        self._holds.clear()
        for life in self._lives.values():
            if life.timer is not None:
                life.timer.cancel()

    def _leave(self, entry: ModelEntry) -> None:
        life = self._life(entry)
        life.uses -= 1
        life.used_s = self._clock.now()
        if life.uses == 0:
            own_s = entry.keep_alive_s
            self._start_timer(entry, life, own_s if life.keep_alive_s is None else life.keep_alive_s)
            if not entry.is_ready:
                del self._lives[entry]

    def _life(self, entry: ModelEntry) -> _Life:
        return self._lives.setdefault(entry, _Life())

    def _start_timer(self, entry: ModelEntry, life: _Life, delay_s: float) -> None:
        # Written so that NaN is for ever, too.
        if self._closed or not entry.is_ready or not 0 <= delay_s < MAX_KEEP_ALIVE_S:
            return

        def fire() -> None:
            life.timer, entry.expires = None, None
            if self.is_busy(entry):
                self._start_timer(entry, life, max(delay_s, RECHECK_S))
            else:
                self._on_expired(entry)

        life.timer = self._clock.call_later(delay_s, fire)
        entry.expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=delay_s)

    def _stop_timer(self, entry: ModelEntry, life: _Life) -> None:
        if life.timer is not None:
            life.timer.cancel()
        life.timer, entry.expires = None, None
