"""Who waits for a slot, and who is next. Pure policy; the time is given."""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from ..params import Priority
from .sequence import Sequence
from .shares import Shares

Key = tuple[Any, ...]


class WaitingQueue:
    """Sequences that wait, in lanes of one tenant, tag and priority each. Owner thread only.

    A slot goes to the tenant that holds the fewest, of equal ones to the one that has been served least;
    inside it to who has begun before, then to the most urgent, then to the tag with the fewest slots, then
    to the oldest. Between tenants only a low priority counts: it stands behind the others. Each `aging_s`
    of waiting (0: none) makes a request one class more urgent, so that nobody waits for ever.
    """

    def __init__(self, shares: Shares, aging_s: float) -> None:
        self._shares = shares
        self._aging_s = aging_s
        self._lanes: dict[tuple[str, str, Priority], list[Sequence]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no order."""
        return itertools.chain.from_iterable(self._lanes.values())

    def add(self, sequence: Sequence) -> None:
        """It waits from now on."""
        bisect.insort(self._lanes.setdefault(_lane_of(sequence), []), sequence, key=_age)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """It does not wait any more."""
        lane = self._lanes[_lane_of(sequence)]
        lane.remove(sequence)
        self._size -= 1
        if not lane:
            del self._lanes[_lane_of(sequence)]

    def head(self, now: float) -> Sequence | None:
        """Who gets the next slot."""
        if len(self._lanes) == 1:
            return next(iter(self._lanes.values()))[0]
        first: dict[str, tuple[Key, Sequence]] = {}
        for lane in self._lanes.values():
            head = self._inside(lane[0], 0, now), lane[0]
            first[lane[0].tenant] = min(first.get(lane[0].tenant, head), head, key=_key)
        heads = [sequence for _, sequence in first.values()]
        return min(heads, key=lambda sequence: self._between(sequence, 0, now), default=None)

    def order(self, now: float) -> list[Sequence]:
        """All of them as they would get slots, if nobody came or left."""
        in_tag = _ranked(self, lambda sequence: self._inside(sequence, 0, now), lambda s: (s.tenant, s.tag))
        inside = {sequence.id: self._inside(sequence, rank, now) for rank, sequence in in_tag}
        in_tenant = _ranked(self, lambda sequence: inside[sequence.id], lambda s: s.tenant)
        among = {sequence.id: self._between(sequence, rank, now) for rank, sequence in in_tenant}
        return sorted(self, key=lambda sequence: among[sequence.id])

    def yields(self, sequence: Sequence, now: float) -> bool:
        """Whether it stands behind other tenants': not if it has begun."""
        return not sequence.has_begun and self._class_of(sequence, now) > Priority.NORMAL

    def _between(self, sequence: Sequence, rank: int, now: float) -> Key:
        """Its place among all, when `rank` of its tenant's get slots before it."""
        tenant = self._shares.tenant(sequence)
        return (self.yields(sequence, now), tenant.running + rank, tenant.served, sequence.arrival)

    def _inside(self, sequence: Sequence, rank: int, now: float) -> Key:
        """Its place among its tenant's, when `rank` of its tag get slots before it."""
        tag = self._shares.tag(sequence)
        has_begun, *age = _age(sequence)
        return (has_begun, self._class_of(sequence, now), tag.running + rank, tag.served, *age)

    def _class_of(self, sequence: Sequence, now: float) -> int:
        if not self._aging_s:
            return sequence.priority
        return max(Priority.HIGH, sequence.priority - int((now - sequence.received_s) / self._aging_s))


def _lane_of(sequence: Sequence) -> tuple[str, str, Priority]:
    return sequence.tenant, sequence.tag, sequence.priority


def _key(pair: tuple[Key, Sequence]) -> Key:
    return pair[0]


def _age(sequence: Sequence) -> tuple[bool, int]:
    """The place in a lane: who has begun comes first, then who came first."""
    return not sequence.has_begun, sequence.arrival


def _ranked(
    sequences: Iterable[Sequence], key: Callable[[Sequence], Key], part: Callable[[Sequence], Hashable]
) -> Iterator[tuple[int, Sequence]]:
    """Each with the number of those of its part that come before it by `key`."""
    ranks: collections.Counter[Hashable] = collections.Counter()
    for sequence in sorted(sequences, key=key):
        yield ranks[part(sequence)], sequence
        ranks[part(sequence)] += 1
