"""States of ended sequences in host memory: prefixes that take no room in the KV cache.

In one pool attention runs over every cell in use, those of ended sequences too. Out of it
they cost nothing, and to have them back is a copy.
"""

from __future__ import annotations

import dataclasses

from .prefix import common_length

# Looking through them must stay small beside a step.
MOST_SNAPSHOTS = 256


@dataclasses.dataclass(slots=True, frozen=True, eq=False)
class Snapshot:
    """A sequence's tokens, and what `Backend.kv_save` gave for them."""

    # What a prompt says has no place in a traceback.
    tokens: list[int] = dataclasses.field(repr=False)
    scope: str
    data: bytes = dataclasses.field(repr=False)


class Snapshots:
    """Snapshots within a bound of bytes; the one used longest ago goes first."""

    def __init__(self, most_bytes: int, *, can_cut: bool = True) -> None:
        """Without `can_cut` a snapshot serves only what goes on from all of it."""
        self._most_bytes = most_bytes
        self._can_cut = can_cut
        # In the order of use.
        self._kept: dict[Snapshot, None] = {}
        self.bytes = 0
        self.tokens = 0

    def add(self, snapshot: Snapshot) -> None:
        """Keeps a snapshot in place of those that it goes on from."""
        if len(snapshot.data) > self._most_bytes:
            return
        size = len(snapshot.tokens)
        for other in list(self._kept) if self._can_cut else ():
            count = len(other.tokens)
            if other.scope == snapshot.scope and count <= size and other.tokens == snapshot.tokens[:count]:
                self._drop(other)
        self._kept[snapshot] = None
        self.bytes += len(snapshot.data)
        self.tokens += size
        while self.bytes > self._most_bytes or len(self._kept) > MOST_SNAPSHOTS:
            self._drop(next(iter(self._kept)))

    def has(self, tokens: list[int], scope: str) -> bool:
        """Whether one begins with these tokens: another would be of no more use."""
        count = len(tokens) if self._can_cut else None
        return any(one.scope == scope and one.tokens[:count] == tokens for one in self._kept)

    def find(self, tokens: list[int], scope: str, most: int) -> tuple[Snapshot | None, int]:
        """The one with the longest common beginning with `tokens`, up to `most`, and its length."""
        best: tuple[Snapshot | None, int] = None, 0
        for one in self._kept:
            if one.scope == scope:
                length = common_length(tokens, one.tokens, most)
                if length > best[1] and (self._can_cut or length == len(one.tokens)):
                    best = one, length
        return best

    def touch(self, snapshot: Snapshot) -> None:
        """It has been used."""
        del self._kept[snapshot]
        self._kept[snapshot] = None

    def _drop(self, snapshot: Snapshot) -> None:
        del self._kept[snapshot]
        self.bytes -= len(snapshot.data)
        self.tokens -= len(snapshot.tokens)
