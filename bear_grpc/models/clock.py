"""Time as the life of models needs it: what passes, and calls to come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """It comes no more; nothing if it has come."""
        ...


class Clock(Protocol):
    """Seconds that pass. Event loop only."""

    def now(self) -> float:
        """Seconds since a moment of its own; never goes back."""
        ...

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Has `call` called in this loop, not before `delay_s` have passed."""
        ...


async def pause(clock: Clock, seconds: float) -> None:
    """Returns when so much time has passed."""
    if seconds <= 0:
        return
    over = asyncio.Event()
    timer = clock.call_later(seconds, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()


class LoopClock:
    """The clock of the running event loop."""

    def now(self) -> float:
        """The loop's time."""
        return asyncio.get_running_loop().time()

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """See `Clock`."""
        return asyncio.get_running_loop().call_later(delay_s, call)
