"""What an engine tells: events in frames of bounded size, and its counts as often as they matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..protocol import Delta, SequenceEvent, Step
from ..types import EngineStats

STATS_INTERVAL_S = 0.1
# Of one frame's events, about; a delta never comes near it. What a token takes besides its piece.
FRAME_BYTES = 2**20
TOKEN_BYTES = 48


@dataclasses.dataclass(slots=True)
class Counters:
    """What only grows; names as in EngineStats."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    cached_tokens: int = 0
    forward_s: float = 0.0
    sampling_s: float = 0.0
    overhead_s: float = 0.0

    def values(self) -> dict[str, Any]:
        """All of them by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class Outbox:
    """Collects the events of a step. Owner thread only."""

    def __init__(
        self,
        emit: Callable[[Step], None],
        stats: Callable[[], EngineStats],
        clock: Callable[[], float],
    ) -> None:
        """`emit` takes each frame and must not block; `stats` counts."""
        self._emit = emit
        self._stats = stats
        self._clock = clock
        self._events: list[SequenceEvent] = []
        self._due_s = 0.0
        self._are_stale = False

    def tell(self, event: SequenceEvent) -> None:
        """The next event; it leaves with `flush`."""
        self._events.append(event)

    def flush(self) -> None:
        """Emits what has happened since the last time, if anything."""
        if self._events:
            *before, last = in_frames(self._events)
            for events in before:
                self._emit(Step(events))
            self._emit(Step(last, self._stats_if_due()))
            self._events.clear()

    def settle(self) -> None:
        """Nothing is computed for now: what was not counted yet is told."""
        if self._are_stale and not self._events:
            self._are_stale = False
            self._emit(Step([], self._stats()))

    def _stats_if_due(self) -> EngineStats | None:
        """Counting costs as much as planning: not for every token."""
        now = self._clock()
        self._are_stale = now < self._due_s and all(isinstance(event, Delta) for event in self._events)
        if self._are_stale:
            return None
        self._due_s = now + STATS_INTERVAL_S
        return self._stats()


def in_frames(events: list[SequenceEvent]) -> list[list[SequenceEvent]]:
    """The events in order, cut where a frame would become too long for the connection."""
    frames: list[list[SequenceEvent]] = [[]]
    size = 0
    for event in events:
        if isinstance(event, Delta):
            pieces = sum(TOKEN_BYTES + len(t.piece) + len(t.top) * TOKEN_BYTES for t in event.tokens)
            size += 4 * len(event.text) + pieces
            if size > FRAME_BYTES and frames[-1]:
                frames.append([])
                size = 4 * len(event.text) + pieces
        frames[-1].append(event)
    return frames
