"""How busy models share the CPU: each gets its part of the cores."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol import Frame, Share


class CpuShare:
    """Tells every worker how many models compute at this moment. Event loop only.

    Two models with all cores each are slower together than one alone: their
    threads wait for each other at every barrier.
    """

    def __init__(self) -> None:
        self._senders: dict[object, Callable[[Frame], None]] = {}
        self._busy: set[object] = set()

    def join(self, member: object, send: Callable[[Frame], None]) -> None:
        """A worker is there; `send` takes its frames."""
        self._senders[member] = send
        send(Share(max(1, len(self._busy))))

    def leave(self, member: object) -> None:
        """A worker is gone."""
        self._senders.pop(member, None)
        self.set_busy(member, False)

    def set_busy(self, member: object, busy: bool) -> None:
        """A worker has work, or has none any more."""
        before = max(1, len(self._busy))
        (self._busy.add if busy else self._busy.discard)(member)
        now = max(1, len(self._busy))
        if now != before:
            for send in self._senders.values():
                send(Share(now))
