"""The KV cache's book-keeping agrees with the cells that a backend really has."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.backend.base import Batch, Outcome
from bear_grpc.engine.kv import FEWEST_AWAITED, FEWEST_SHARED, KvCache
from bear_grpc.engine.prefix import common_length
from bear_grpc.engine.sequence import Phase, Sequence
from bear_grpc.engine.stop import TextMachine
from bear_grpc.params import OutputParams, SamplingParams, StopParams
from bear_grpc.testing import FakeBackend
from bear_grpc.types import LoadOptions

SLOTS = 3
ORDER = itertools.count(1)


def sequence(tokens: list[int], *, scope: str = "", max_tokens: int = 4, **changes: object) -> Sequence:
    made = Sequence(
        id=next(ORDER),
        tokens=list(tokens),
        sampling=SamplingParams(),
        stop=StopParams(),
        max_tokens=max_tokens,
        text=TextMachine(),
        received_s=0.0,
        credit=100,
        scope=scope,
        **changes,
    )
    made.order, made.phase = made.id, Phase.PREFILL
    return made


def backend(**changes: object) -> FakeBackend:
    options = LoadOptions(max_sequences=SLOTS, context_length=64, batch_tokens=64, kv_cache_tokens=120)
    return FakeBackend(options, **{"sequence_ids": 6, **changes})


def parts(**changes: object) -> FakeBackend:
    """A part of its own for each sequence, and snapshots."""
    options = LoadOptions(max_sequences=SLOTS, context_length=64, batch_tokens=64, kv_unified=False)
    return FakeBackend(options, **{"snapshot_bytes": 1000, **changes})


def compute(made: FakeBackend, which: Sequence, upto: int | None = None) -> None:
    """Computes its tokens, as a step does."""
    batch = Batch(64)
    tokens = which.tokens[which.num_computed : upto]
    batch.extend(which.sequence_id, which.num_computed, tokens, True)
    assert made.forward(batch) is Outcome.DONE
    which.num_computed += len(tokens)


def ended(made: FakeBackend, kv: KvCache, tokens: list[int], **changes: object) -> None:
    """A sequence that has come and gone and left its tokens."""
    gone = sequence(tokens, **changes)
    kv.fill(gone)
    compute(made, gone)
    kv.release(gone, keep=True)


@given(
    one=st.lists(st.integers(0, 1), max_size=9),
    other=st.lists(st.integers(0, 1), max_size=9),
    most=st.integers(0, 9),
)
def test_common_length_is_that_of_the_longest_common_beginning(one, other, most):
    length = common_length(one, other, most)
    assert length <= most
    assert one[:length] == other[:length]
    rest = list(zip(one, other, strict=False))[length:most]
    assert not rest or rest[0][0] != rest[0][1]


def test_fill_takes_the_prefix_of_an_ended_sequence():
    made = backend()
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    later = sequence([*range(15), 99, 98])
    assert kv.fill(later) == 15
    assert made.kv_tokens(later.sequence_id) == list(range(15))


def test_fill_leaves_at_least_one_token_to_compute():
    made = backend()
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    same = sequence(list(range(20)))
    assert kv.fill(same) == 19


def test_fill_takes_nothing_of_another_scope():
    made = backend()
    kv = KvCache(made)
    ended(made, kv, list(range(20)), scope="one")
    assert kv.fill(sequence(list(range(20)), scope="other")) == 0


def test_fill_takes_nothing_where_prefixes_are_not_shared():
    made = backend()
    kv = KvCache(made, share_prefixes=False)
    ended(made, kv, list(range(20)))
    assert made.kv_used() == 0
    assert kv.fill(sequence(list(range(20)))) == 0


def test_fill_takes_nothing_for_prompt_logprobs():
    made = backend()
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    output = OutputParams(echo=True, logprobs=True)
    assert kv.fill(sequence(list(range(20)), output=output)) == 0


def test_fill_ignores_prefixes_that_are_not_worth_a_copy():
    made = backend()
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    assert kv.fill(sequence([*range(FEWEST_SHARED - 1), 99, 98])) == 0
    assert kv.fill(sequence([*range(FEWEST_SHARED), 99, 98])) == FEWEST_SHARED


def test_fill_of_a_state_that_cannot_be_cut_takes_it_whole_or_not_at_all():
    made = backend(can_cut=False, sequence_ids=None)
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    assert kv.fill(sequence([*range(15), 99])) == 0
    assert kv.fill(sequence([*range(20), 99])) == 20


def test_find_leader_wants_enough_to_wait_for():
    made = backend()
    kv = KvCache(made)
    leader = sequence(list(range(50)))
    kv.fill(leader)
    compute(made, leader, 10)
    follower = sequence([*range(10 + FEWEST_AWAITED), 99])
    assert kv.find(follower).length == 10
    assert kv.find_leader(follower, 10).length == 10 + FEWEST_AWAITED
    assert kv.find_leader(follower, 11).place is None


def test_find_leader_never_follows_a_younger_one():
    made = backend()
    kv = KvCache(made)
    older = sequence(list(range(50)))
    younger = sequence(list(range(50)))
    kv.fill(younger)
    assert kv.find_leader(older, 0).place is None


def test_room_is_that_of_all_that_running_sequences_may_come_to():
    made = backend()
    kv = KvCache(made)
    kv.fill(sequence(list(range(40)), max_tokens=20))
    assert kv.has_room_for(sequence(list(range(100, 130)), max_tokens=30))
    assert not kv.has_room_for(sequence(list(range(100, 130)), max_tokens=31))
    # Of the same prompt one token is computed again, the rest is shared.
    assert kv.has_room_for(sequence(list(range(40)), max_tokens=59))
    assert not kv.has_room_for(sequence(list(range(40)), max_tokens=60))


def test_make_room_gives_up_the_prefix_used_longest_ago_first():
    made = backend()
    kv = KvCache(made)
    for first in (0, 100, 200):
        ended(made, kv, list(range(first, first + 30)))
    assert kv.find(sequence(list(range(40)))).length == 30
    kv.fill(sequence(list(range(40))))  # uses the first one
    assert kv.make_room(31)
    assert kv.find(sequence(list(range(100, 140)))).place is None
    assert kv.find(sequence(list(range(200, 240)))).length == 30


def test_evicted_prefix_that_a_running_sequence_shares_stays_with_it():
    made = backend()
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    running = sequence([*range(15), 99, 98])
    kv.fill(running)
    while kv.evict():
        pass
    assert made.kv_tokens(running.sequence_id) == list(range(15))
    assert (kv.used_tokens, kv.idle_tokens) == (15, 0)


@pytest.mark.parametrize("kind", ["unified", "kept", "split", "split kept", "whole", "whole kept"])
@settings(max_examples=120)
@given(data=st.data())
def test_books_agree_with_the_cells_in_every_history(kind, data):
    """Counts are those of the cells; what a place is said to have is what it has."""
    options = LoadOptions(
        max_sequences=SLOTS,
        context_length=40,
        batch_tokens=64,
        kv_cache_tokens=120,
        kv_unified=kind in ("unified", "kept"),
    )
    made = FakeBackend(
        options,
        can_cut=not kind.startswith("whole"),
        sequence_ids=6 if kind in ("unified", "kept") else None,
        snapshot_bytes=300 if kind.endswith("kept") else 0,
    )
    kv = KvCache(made)
    running: list[Sequence] = []
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=4)
    for _ in range(data.draw(st.integers(1, 25))):
        move = data.draw(st.sampled_from(["fill", "compute", "end", "lose", "evict", "truncate"]))
        if move == "fill" and len(running) < SLOTS:
            # Few beginnings, so that they meet.
            start = data.draw(st.integers(0, 3))
            word = data.draw(st.integers(7, 9))
            running.append(sequence([word] * (9 * start) + data.draw(tokens)))
            kv.fill(running[-1])
        elif move == "compute" and running:
            which = data.draw(st.sampled_from(running))
            if which.num_left and kv.make_room(which.num_left):
                compute(made, which)
                which.tokens.append(data.draw(st.integers(0, 1)))
                if len(which.tokens) > 38:
                    running.remove(which)
                    kv.release(which, keep=True)
        elif move in ("end", "lose") and running:
            which = running.pop(data.draw(st.integers(0, len(running) - 1)))
            kv.release(which, keep=move == "end")
        elif move == "evict":
            kv.evict()
        elif move == "truncate" and running:
            which = data.draw(st.sampled_from(running))
            kv.truncate(which, data.draw(st.integers(0, which.num_computed)))
        assert kv.used_tokens == made.kv_used()
        for which in running:
            assert made.kv_tokens(which.sequence_id) == which.tokens[: which.num_computed]
    for which in running:
        kv.release(which, keep=False)
    assert kv.used_tokens == kv.idle_tokens == made.kv_used()
    while kv.evict():
        pass
    assert made.kv_used() == 0


def test_snapshot_takes_no_room_and_gives_the_prefix_back():
    made = backend(snapshot_bytes=1000)
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    assert (made.kv_used(), kv.snapshots.tokens) == (0, 20)
    later = sequence([*range(15), 99, 98])
    assert kv.fill(later) == 15
    assert made.kv_tokens(later.sequence_id) == list(range(15))


def test_snapshot_is_taken_once_and_cells_that_are_there_are_shared():
    made = backend(snapshot_bytes=1000)
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    for end in (98, 99):
        assert kv.fill(sequence([*range(15), end])) == 15
    assert made.kv_used() == 15


def test_snapshot_replaces_those_that_it_goes_on_from():
    made = backend(snapshot_bytes=1000)
    kv = KvCache(made)
    for count in (10, 20, 15):
        ended(made, kv, list(range(count)))
    assert kv.snapshots.tokens == 20


def test_snapshots_beyond_their_bytes_go_in_the_order_of_use():
    made = backend(snapshot_bytes=2 * (8 + 4 * 20))  # of the fake: 8 bytes and 4 for each token
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    ended(made, kv, list(range(100, 120)))
    kv.fill(sequence([*range(20), 99]))
    ended(made, kv, list(range(200, 220)))
    assert kv.snapshots.bytes <= made.kv.snapshot_bytes
    assert kv.find(sequence([*range(20), 98])).length == 20
    assert kv.find(sequence([*range(100, 120), 99])).length == 0


def test_snapshot_of_another_scope_is_not_found():
    made = backend(snapshot_bytes=1000)
    kv = KvCache(made)
    ended(made, kv, list(range(20)), scope="one")
    assert kv.find(sequence(list(range(20)), scope="other")).length == 0


def test_snapshot_without_room_for_it_is_computed_again():
    made = backend(snapshot_bytes=1000)
    kv = KvCache(made)
    ended(made, kv, list(range(40)))
    for first in (100, 200):
        busy = sequence(list(range(first, first + 50)))
        kv.fill(busy)
        compute(made, busy)
    again = sequence([*range(40), 99])
    assert kv.fill(again) == 0
    assert made.kv_tokens(again.sequence_id) == []


# ---- snapshots of parts -----------------------------------------------------------------------------


def test_part_of_an_ended_sequence_stays_and_a_snapshot_is_taken_when_its_place_is_needed():
    made = parts()
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    assert (made.kv_used(), kv.snapshots.tokens) == (20, 0)
    for first in (100, 140):
        kv.fill(sequence(list(range(first, first + 9))))
    assert kv.snapshots.tokens == 0
    last = sequence(list(range(180, 189)))
    kv.fill(last)
    assert (made.kv_used(), kv.snapshots.tokens) == (0, 20)
    kv.release(last, keep=False)
    again = sequence([*range(20), 99])
    assert kv.fill(again) == 20
    assert made.kv_tokens(again.sequence_id) == list(range(20))


@pytest.mark.parametrize(("tail", "tokens"), [(FEWEST_SHARED - 1, 0), (FEWEST_SHARED, 30)])
def test_part_whose_tail_is_cut_leaves_a_snapshot_if_the_tail_is_worth_it(tail, tokens):
    made = parts()
    kv = KvCache(made)
    ended(made, kv, list(range(30)))
    shorter = sequence([*range(30 - tail), 99])
    assert kv.fill(shorter) == 30 - tail
    assert kv.snapshots.tokens == tokens
    compute(made, shorter)
    assert kv.fill(sequence([*range(30), 98])) == (30 if tokens else 30 - tail)


def test_snapshot_that_is_wanted_outlives_the_one_made_for_its_place():
    made = parts(snapshot_bytes=8 + 4 * 20)  # one of them
    kv = KvCache(made)
    ended_and_lost(made, kv, list(range(20)))
    for first in (100, 140, 180):
        ended(made, kv, list(range(first, first + 20)))
    again = sequence([*range(20), 99])
    assert kv.fill(again) == 20
    assert made.kv_tokens(again.sequence_id) == list(range(20))


def test_part_without_bytes_for_snapshots_is_lost_with_its_place():
    made = parts(snapshot_bytes=0)
    kv = KvCache(made)
    ended(made, kv, list(range(20)))
    for first in (100, 140, 180):
        kv.fill(sequence(list(range(first, first + 9))))
    assert kv.find(sequence([*range(20), 99])).length == 0


def test_snapshot_of_a_state_that_cannot_be_cut_is_taken_whole():
    made = parts(can_cut=False)
    kv = KvCache(made)
    ended_and_lost(made, kv, list(range(20)))
    assert kv.fill(sequence([*range(20), 99])) == 20


def test_snapshot_that_cannot_be_cut_hides_no_prefix_that_can_be_taken():
    made = parts(can_cut=False)
    kv = KvCache(made)
    ended_and_lost(made, kv, [*range(20), 50, 51])
    ended(made, kv, list(range(15)))
    assert kv.fill(sequence([*range(20), 99])) == 15


def ended_and_lost(made: FakeBackend, kv: KvCache, tokens: list[int]) -> None:
    """Its place has gone to others, and they are gone as well."""
    ended(made, kv, tokens)
    others = [sequence(list(range(first, first + 9))) for first in (100, 140, 180)]
    for other in others:
        kv.fill(other)
    for other in others:
        kv.release(other, keep=False)
    assert (made.kv_used(), kv.snapshots.tokens) == (0, len(tokens))
