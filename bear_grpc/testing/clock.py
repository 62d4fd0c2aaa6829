"""Time that moves only when told."""

from __future__ import annotations


class FakeClock:
    """A clock to inject: call it for the seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds
