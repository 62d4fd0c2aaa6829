"""Who has what in the KV cache: sequence ids, shared prefixes, room.

A sequence id is a place. Running sequences hold one each. The tokens of ended
sequences are kept for prompts that begin alike: as snapshots in host memory, or in
places of their own until room is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from ..backend.base import Backend
from .prefix import common_length
from .sequence import Phase, Sequence
from .snapshots import Snapshot, Snapshots

# Copying less is not worth it, and a BOS alone is no prefix.
FEWEST_SHARED = 8
# A sequence waits for a prefix that is under way only if it saves so much.
FEWEST_AWAITED = 32


@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """One sequence id. `shared` of its tokens lie in cells of `parent`'s, in a unified cache."""

    id: int
    owner: Sequence | None = None
    kept: list[int] = dataclasses.field(default_factory=list)
    scope: str = ""
    used_at: int = 0
    parent: Place | None = None
    shared: int = 0

    @property
    def tokens(self) -> list[int]:
        """What it has, and for a running owner also what it is about to have."""
        return self.kept if self.owner is None else self.owner.tokens

    @property
    def length(self) -> int:
        """Tokens that it has in the KV cache."""
        return len(self.kept) if self.owner is None else self.owner.num_computed


@dataclasses.dataclass(slots=True, frozen=True)
class Match:
    """Where to take the longest prefix from, and how much; nothing: both None, length 0."""

    place: Place | None = None
    length: int = 0
    snapshot: Snapshot | None = None


class KvCache:
    """The places of a backend. Owner thread only."""

    def __init__(self, backend: Backend, *, share_prefixes: bool = True) -> None:
        self._backend = backend
        self._traits = backend.kv
        self._places = [Place(id) for id in range(backend.kv.sequence_ids)]
        self._share = share_prefixes
        self.snapshots = Snapshots(backend.kv.snapshot_bytes, can_cut=backend.kv.can_cut)
        self._now = 0
        self._surely_free = 0

    @property
    def keeps_snapshots(self) -> bool:
        """Whether a sequence that loses its place leaves a snapshot."""
        return self._traits.snapshot_bytes > 0

    @property
    def used_tokens(self) -> int:
        """Cells in use, shared ones counted once."""
        return sum(place.length - place.shared for place in self._places)

    @property
    def idle_tokens(self) -> int:
        """Of them those in places that nobody runs in, and shared by nobody who runs."""
        pinned = _pinned(self._running())
        idle = 0
        for place in self._places:
            if place.owner is None:
                idle += place.length - max(place.shared, pinned.get(place.id, 0))
        return idle

    def find(self, sequence: Sequence) -> Match:
        """The longest prefix of the sequence's tokens that can be taken now."""
        best = Match()
        for place in self._candidates(sequence):
            length = min(self._common(sequence, place), place.length)
            if not self._traits.can_cut and length < place.length:
                continue
            if length > best.length or (length == best.length and place.owner is None and length):
                best = Match(place, length)
        if self._share and sequence.most_cached:
            snapshot, length = self.snapshots.find(sequence.tokens, sequence.scope, sequence.most_cached)
            # Cells that are there are shared; only for more than these a state is worth its copy.
            if length > best.length and snapshot is not None:
                best = Match(None, length, snapshot)
        return best if best.length >= FEWEST_SHARED else Match()

    def foresee(self, sequence: Sequence, before: Iterable[Sequence] = ()) -> int:
        """Tokens of a sequence that are cached, or will be when what runs, and those `before`, are read."""
        if not self._share:
            return 0
        lengths = [self._common(sequence, place) for place in self._candidates(sequence)]
        lengths += [
            common_length(sequence.tokens, other.tokens, sequence.most_cached)
            for other in before
            if other.scope == sequence.scope
        ]
        return max([self.find(sequence).length, *lengths])

    def find_leader(self, sequence: Sequence, have: int) -> Match:
        """A running sequence on its way to a prefix that is worth waiting for, beyond `have` tokens."""
        best = Match()
        for place in self._candidates(sequence):
            owner = place.owner
            if owner is None or owner.phase is not Phase.PREFILL or owner.order >= sequence.order:
                continue
            length = min(self._common(sequence, place), owner.num_prompt)
            if length > max(best.length, owner.num_computed):
                best = Match(place, length)
        return best if best.length - have >= FEWEST_AWAITED else Match()

    def has_room_for(self, sequence: Sequence) -> bool:
        """Whether all that it may come to fits beside all that the running ones may come to."""
        if not self._traits.unified:
            return True
        match = self.find(sequence)
        running = self._running()
        pinned = _pinned(running)
        own = sequence.most_tokens
        if match.place is not None:
            own -= (
                match.length
                if match.place.owner is not None
                else min(match.length, pinned.get(match.place.id, 0))
            )
        elif (leader := self.find_leader(sequence, 0)).place is not None:
            own -= leader.length
        for place in running:
            assert place.owner is not None
            own += place.owner.most_tokens - place.shared
        return own + sum(pinned.values()) <= self._traits.pool_tokens

    def reserve(self, sequence: Sequence) -> None:
        """Gives a sequence an empty place."""
        self._own(self._free_place(None), sequence)

    def fill(self, sequence: Sequence) -> int:
        """Gives a sequence the longest prefix there is, and a place if it has none; its length."""
        match = self.find(sequence)
        source = match.place
        if match.snapshot is not None:
            sequence.num_computed = self._restore(sequence, match.snapshot, match.length)
            return sequence.num_computed
        if source is None:
            if sequence.sequence_id < 0:
                self.reserve(sequence)
            return 0
        self._touch(source)
        sequence.num_computed = self._take(sequence, source, match.length)
        return sequence.num_computed

    def _restore(self, sequence: Sequence, snapshot: Snapshot, length: int) -> int:
        # First: the place that is found for it may leave a snapshot, for which an older one goes.
        self.snapshots.touch(snapshot)
        if sequence.sequence_id < 0:
            self.reserve(sequence)
        id = sequence.sequence_id
        if not self.make_room(len(snapshot.tokens)) or not self._backend.kv_restore(id, snapshot.data):
            return 0
        if length < len(snapshot.tokens) and not self._backend.kv_remove(id, length):
            self._backend.kv_remove(id, 0)
            return 0
        return length

    def _take(self, sequence: Sequence, source: Place, length: int) -> int:
        mine = None if sequence.sequence_id < 0 else self._places[sequence.sequence_id]
        if source.owner is None and self._is_best_left(source, length, mine) and self._cut(source, length):
            if mine is not None:
                mine.owner = None
            source.kept = []
            self._own(source, sequence)
            return length
        if mine is None:
            mine = self._free_place(source)
            self._own(mine, sequence)
            if mine is source:
                return 0
        if not self._backend.kv_copy(source.id, mine.id, length):
            return 0
        if self._traits.unified:
            mine.parent, mine.shared = source, length
        return length

    def _is_best_left(self, source: Place, length: int, mine: Place | None) -> bool:
        """Whether to move into an idle place: nothing is lost by it, or there is no better way."""
        if length == source.length or not self._traits.unified:
            return True
        others = (place for place in self._places if place.owner is None and place is not source)
        return mine is None and not any(others)

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """The sequence ends or loses its place; `keep` leaves its tokens for others."""
        place = self._places[sequence.sequence_id]
        computed = sequence.tokens[: sequence.num_computed]
        place.owner, sequence.sequence_id = None, -1
        place.kept = computed
        self._touch(place)
        is_worth = keep and self._share and len(computed) >= FEWEST_SHARED
        if is_worth and self._traits.unified and self.keeps_snapshots:
            # Attention runs over all that is in the pool: what nobody runs in costs everybody.
            self._snapshot(place)
            is_worth = False
        if not is_worth:
            self._empty(place)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """The KV cache may have more of it than `length` tokens: takes it back, or all of it."""
        place = self._places[sequence.sequence_id]
        if not self._backend.kv_remove(place.id, length):
            self._backend.kv_remove(place.id, 0)
            length = 0
        sequence.num_computed = length
        self._detach(place, length)

    def make_room(self, tokens: int) -> bool:
        """Gives up idle places until so many tokens fit; False if they do not even then."""
        if not self._traits.unified:
            return True
        # Only computed tokens take room, and each of them passes here: counting is rarely needed.
        if self._surely_free < tokens:
            while (free := self._traits.pool_tokens - self.used_tokens) < tokens:
                if not self.evict():
                    return False
            self._surely_free = free
        self._surely_free -= tokens
        return True

    def evict(self) -> bool:
        """Gives up the idle place that was used longest ago; False if there is none."""
        idle = [place for place in self._places if place.owner is None and place.kept]
        if not idle:
            return False
        self._empty(min(idle, key=lambda place: place.used_at))
        return True

    def _running(self) -> list[Place]:
        return [place for place in self._places if place.owner is not None]

    def _candidates(self, sequence: Sequence) -> Iterator[Place]:
        if not self._share or not sequence.most_cached:
            return
        for place in self._places:
            if place.scope == sequence.scope and place.owner is not sequence and place.tokens:
                yield place

    def _common(self, sequence: Sequence, place: Place) -> int:
        return common_length(sequence.tokens, place.tokens, sequence.most_cached)

    def _own(self, place: Place, sequence: Sequence) -> None:
        place.owner, place.scope, sequence.sequence_id = sequence, sequence.scope, place.id

    def _touch(self, place: Place) -> None:
        self._now += 1
        place.used_at = self._now

    def _free_place(self, protected: Place | None) -> Place:
        """An empty place, the lowest; else the idle one used longest ago, emptied; `protected` last."""
        idle = [place for place in self._places if place.owner is None]
        free = next((place for place in idle if not place.kept), None)
        if free is None:
            free = min(idle, key=lambda place: (place is protected, place.used_at))
            self._snapshot(free)
            self._empty(free)
        return free

    def _snapshot(self, place: Place) -> None:
        """Keeps what an idle place has, before it is lost."""
        if self.keeps_snapshots and not self.snapshots.has(place.kept, place.scope):
            self.snapshots.add(Snapshot(place.kept, place.scope, self._backend.kv_save(place.id)))

    def _cut(self, place: Place, length: int) -> bool:
        if place.length - length >= FEWEST_SHARED:
            self._snapshot(place)
        if length < place.length and not self._backend.kv_remove(place.id, length):
            return False
        place.kept = place.kept[:length]
        self._detach(place, length)
        return True

    def _empty(self, place: Place) -> None:
        self._backend.kv_remove(place.id, 0)
        place.kept = []
        self._detach(place, 0)

    def _detach(self, place: Place, length: int) -> None:
        """`place` has only `length` tokens left: cells beyond it belong to those that share them."""
        heirs = [other for other in self._places if other.parent is place and other.shared > length]
        if heirs:
            first = max(heirs, key=lambda heir: heir.shared)
            for heir in heirs:
                if heir is not first:
                    heir.parent = first
            # What is left of `place` is shared by the first heir; what is gone was shared with no other.
            up = place.parent if length <= place.shared else place
            first.shared = length if up is place else min(place.shared, first.shared)
            first.parent = up if first.shared else None
        if length <= place.shared:
            place.shared = length
            if not length:
                place.parent = None


def _pinned(running: list[Place]) -> dict[int, int]:
    """By id of a place that nobody runs in: how many of its cells a running sequence shares."""
    found: dict[int, int] = {}
    for place in running:
        if place.parent is not None and place.parent.owner is None:
            found[place.parent.id] = max(found.get(place.parent.id, 0), place.shared)
    return found
