"""Common beginnings are computed once: by whom, for whom, and what everybody is told about it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.backend.base import Outcome
from bear_grpc.engine.echo import Echo
from bear_grpc.engine.engine import EngineBroken
from bear_grpc.engine.kv import FEWEST_AWAITED
from bear_grpc.params import OutputParams, SamplingParams
from bear_grpc.protocol import Started
from bear_grpc.types import LoadOptions
from tests.engine.harness import Harness, SpyBackend, alone
from tests.engine.test_batching import ARRIVALS, SHAPES, Request, Shape, expected, run

LONG = "p" * 100


def cached(harness: Harness, id: int) -> int:
    """What Started has told."""
    [started] = [event for event in harness.events(id) if isinstance(event, Started)]
    return started.cached_tokens


def prompt_rows(harness: Harness, id: int) -> int:
    """Prompt tokens of a sequence that the backend was given."""
    return sum(position < harness.sequences[id].num_prompt for position in harness.computed[id])


def waiting_for(harness: Harness, id: int) -> int | None:
    leader = harness.sequences[id].leader
    return None if leader is None else leader.id


@settings(max_examples=80)
@given(arrivals=ARRIVALS, shape=SHAPES)
def test_cached_tokens_and_those_computed_are_the_prompt(arrivals, shape):
    harness = run(arrivals, shape)
    for id, request in enumerate(arrivals):
        assert prompt_rows(harness, id) + harness.result(id).cached == len(request.prompt)
        assert cached(harness, id) == harness.result(id).cached
        assert len(set(harness.computed[id])) == len(harness.computed[id])


# ---- followers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "rows"), [(FEWEST_AWAITED - 1, 33), (FEWEST_AWAITED, 2)])
def test_follower_waits_only_for_what_is_worth_it(shared, rows):
    harness = Harness(batch_tokens=100)
    harness.submit(1, "p" * shared + "a", max_tokens=1)
    harness.submit(2, "p" * shared + "bc", max_tokens=1)
    harness.run()
    assert prompt_rows(harness, 2) == rows
    assert cached(harness, 2) == shared + 2 - rows


def leader_and_followers(batch_tokens: int = 16, **changes: object) -> Harness:
    """A leader with 32 of its 101 tokens computed, and two that wait for 100 of them."""
    harness = Harness(batch_tokens=batch_tokens, **changes)
    for id in (1, 2, 3):
        harness.submit(id, LONG + "abc"[id - 1], max_tokens=4)
    harness.step()
    harness.step()
    assert harness.sequences[1].num_computed == 2 * batch_tokens
    assert [waiting_for(harness, id) for id in (1, 2, 3)] == [None, 1, 1]
    return harness


def assert_followers_unchanged(harness: Harness) -> None:
    for id in (2, 3):
        assert harness.result(id) == alone(LONG + "abc"[id - 1], max_tokens=4)
    assert harness.is_clean()


def test_followers_get_what_their_leader_has_computed():
    harness = leader_and_followers()
    harness.run()
    assert [cached(harness, id) for id in (1, 2, 3)] == [0, 100, 100]
    assert [prompt_rows(harness, id) for id in (1, 2, 3)] == [101, 1, 1]
    assert_followers_unchanged(harness)


def test_followers_are_not_started_before_their_prefix_is_there():
    harness = leader_and_followers()
    assert harness.events(2) == harness.events(3) == []
    assert harness.engine.stats().running == 3


def test_leader_cancelled_hands_on_what_it_has_and_the_first_follower_leads():
    harness = leader_and_followers()
    harness.engine.cancel(1)
    harness.step()
    assert waiting_for(harness, 3) == 2
    harness.run()
    assert [cached(harness, id) for id in (2, 3)] == [32, 100]
    assert [prompt_rows(harness, id) for id in (2, 3)] == [69, 1]
    assert_followers_unchanged(harness)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.INVALID])
def test_leader_of_a_failed_step_hands_on_its_lead_and_nothing_it_computed(outcome):
    """What a failed step has left in the KV cache is not to be trusted."""
    harness = leader_and_followers()
    harness.backend.fail_next(outcome, kept=5)
    harness.run()
    assert harness.result(1).error is not None
    assert [cached(harness, id) for id in (2, 3)] == [0, 100]
    assert_followers_unchanged(harness)


def test_leader_that_ends_with_its_prompt_leaves_it_to_its_followers():
    harness = Harness(batch_tokens=101)
    harness.submit(1, LONG, max_tokens=0)
    harness.submit(2, LONG + "b", max_tokens=4)
    harness.submit(3, LONG + "c", max_tokens=4)
    harness.run()
    assert [cached(harness, id) for id in (1, 2, 3)] == [0, 100, 100]
    assert_followers_unchanged(harness)


def test_leader_preempted_hands_on_its_lead():
    harness = Harness(batch_tokens=16, max_sequences=2)
    harness.submit(1, LONG + "a", max_tokens=4)
    harness.submit(2, LONG + "b", max_tokens=4)
    harness.step()
    # 16, 8, 4, 2 tokens and 1: the follower goes first, and comes back behind its leader.
    harness.backend.fail_next(*[Outcome.NO_KV_ROOM] * 5)
    harness.step()
    assert harness.sequences[2].preemptions == 1
    harness.step()
    assert waiting_for(harness, 2) == 1
    harness.run()
    assert cached(harness, 2) == 100
    assert [harness.result(id).ids for id in (1, 2)] == [alone(LONG + end, max_tokens=4).ids for end in "ab"]


def test_leader_aborted_keeps_its_followers():
    harness = leader_and_followers()
    harness.backend.fail_next(Outcome.ABORTED, kept=3)
    harness.step()
    assert harness.sequences[1].num_computed == 35
    assert [waiting_for(harness, id) for id in (2, 3)] == [1, 1]
    harness.run()
    assert [cached(harness, id) for id in (2, 3)] == [100, 100]
    assert_followers_unchanged(harness)


def test_follower_cancelled_leaves_leader_and_others_alone():
    harness = leader_and_followers()
    harness.engine.cancel(2)
    harness.run()
    assert harness.result(2).error is None
    assert [harness.result(id) for id in (1, 3)] == [alone(LONG + end, max_tokens=4) for end in "ac"]
    assert cached(harness, 3) == 100


def test_chain_of_followers_each_gets_the_longest_beginning():
    beginnings = ["p" * 50, "p" * 50 + "q" * 50, "p" * 50 + "q" * 50 + "r" * 50]
    harness = Harness(batch_tokens=16)
    for id, beginning in enumerate(beginnings):
        harness.submit(id, beginning + "x", max_tokens=2)
    harness.step()
    assert [waiting_for(harness, id) for id in range(3)] == [None, 0, 1]
    harness.run()
    assert [cached(harness, id) for id in range(3)] == [0, 50, 100]
    assert [harness.result(id) for id in range(3)] == [alone(b + "x", max_tokens=2) for b in beginnings]


def test_chain_whose_middle_is_cancelled_goes_on():
    beginnings = ["p" * 50, "p" * 50 + "q" * 50, "p" * 50 + "q" * 50 + "r" * 50]
    harness = Harness(batch_tokens=16)
    for id, beginning in enumerate(beginnings):
        harness.submit(id, beginning + "x", max_tokens=2)
    harness.step()
    harness.engine.cancel(1)
    harness.run()
    assert [cached(harness, id) for id in (0, 2)] == [0, 50]
    assert harness.result(2) == alone(beginnings[2] + "x", max_tokens=2)


def test_prompt_logprobs_lead_and_never_follow():
    harness = Harness(batch_tokens=16)
    harness.submit(1, LONG + "a", max_tokens=2)
    harness.submit(2, LONG + "b", max_tokens=2, **echo_with_logprobs())
    harness.submit(3, LONG + "b", max_tokens=2)
    harness.run()
    assert [cached(harness, id) for id in (1, 2, 3)] == [0, 0, 100]
    assert prompt_rows(harness, 2) == 101


def echo_with_logprobs() -> dict[str, object]:
    return {"output": OutputParams(echo=True, logprobs=True), "echo": Echo()}


# ---- several answers to one prompt ------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize(
    "kind", [(True, True), (False, True), (False, False)], ids=["unified", "split", "whole"]
)
def test_branches_cost_one_prefill_and_each_equals_a_lone_run_with_its_seed(n, kind):
    unified, can_cut = kind
    harness = Harness(
        max_sequences=n, batch_tokens=32, options=LoadOptions(kv_unified=unified), can_cut=can_cut
    )

    def sampling(index: int) -> SamplingParams:
        return SamplingParams(seed=40 + index, temperature=1.5, top_k=0)

    for index in range(n):
        harness.submit(index, LONG, sampling=sampling(index), max_tokens=5)
    harness.run()
    rows = sum(len(batch) for batch in harness.backend.batches)
    # The last drawn token of each is never computed.
    assert rows == len(LONG) + (n - 1) + n * 4
    for index in range(n):
        assert harness.result(index) == alone(LONG, sampling=sampling(index), max_tokens=5)
    assert len({harness.result(index).ids for index in range(n)}) == n
    assert [cached(harness, index) for index in range(n)] == [0] + [len(LONG) - 1] * (n - 1)


def test_branches_beyond_the_slots_still_compute_the_prompt_once():
    harness = Harness(max_sequences=2, batch_tokens=32)
    for index in range(5):
        harness.submit(index, LONG, max_tokens=3)
    harness.run()
    assert sum(prompt_rows(harness, index) for index in range(5)) == len(LONG) + 4
    assert {harness.result(index).ids for index in range(5)} == {alone(LONG, max_tokens=3).ids}


# ---- what is kept -----------------------------------------------------------------------------------


def test_prefix_of_an_ended_sequence_is_used_by_a_later_one():
    harness = Harness(batch_tokens=64)
    harness.submit(1, LONG, max_tokens=2)
    harness.run()
    harness.submit(2, LONG + "more", max_tokens=2)
    harness.run()
    assert cached(harness, 2) == 100
    assert harness.engine.stats().cached_tokens == 100
    assert harness.result(2) == alone(LONG + "more", max_tokens=2)


@pytest.mark.parametrize("when", ["together", "later"])
def test_prefix_is_not_shared_across_scopes(when):
    harness = Harness(batch_tokens=16)
    harness.submit(1, LONG, scope="one")
    if when == "later":
        harness.run()
    harness.submit(2, LONG, scope="other")
    harness.run()
    assert (cached(harness, 2), prompt_rows(harness, 2)) == (0, 100)


@pytest.mark.parametrize("when", ["together", "later"])
def test_prefixes_not_shared_at_all_leave_the_kv_cache_empty(when):
    harness = Harness(batch_tokens=16, share_prefixes=False)
    harness.submit(1, LONG)
    if when == "later":
        harness.run()
    harness.submit(2, LONG)
    harness.run()
    assert (cached(harness, 2), prompt_rows(harness, 2)) == (0, 100)
    assert harness.backend.kv_used() == 0


def test_prefix_used_longest_ago_is_given_up_first():
    harness = Harness(
        max_sequences=1, batch_tokens=64, context_length=110, options=LoadOptions(kv_cache_tokens=150)
    )
    for id, prompt in enumerate(["a" * 40, "b" * 40, "c" * 40]):
        harness.submit(id, prompt, max_tokens=0)
        harness.run()
    harness.submit(3, "a" * 40 + "x", max_tokens=0)  # used again: b is the oldest now
    harness.submit(4, "d" * 40, max_tokens=0)
    harness.run()
    for id, prompt in enumerate(["c" * 40, "b" * 40], 5):
        harness.submit(id, prompt + "y", max_tokens=0)
    harness.run()
    assert [cached(harness, id) for id in (3, 5, 6)] == [40, 40, 0]


def test_prefix_that_a_running_sequence_shares_outlives_its_eviction():
    harness = Harness(
        max_sequences=2, batch_tokens=64, context_length=110, options=LoadOptions(kv_cache_tokens=150)
    )
    harness.submit(1, LONG, max_tokens=0)
    harness.run()
    harness.submit(2, "p" * 60 + "x", max_tokens=6)
    harness.step()
    assert cached(harness, 2) == 60
    harness.submit(3, "z" * 60, max_tokens=6)  # needs the room of the kept prompt
    harness.run()
    assert harness.result(2) == alone("p" * 60 + "x", max_tokens=6)
    assert harness.result(3) == alone("z" * 60, max_tokens=6)
    assert harness.engine.stats().preemptions == 0
    assert harness.is_clean()


def test_prefix_under_way_needs_no_room_for_a_second_one():
    harness = Harness(
        max_sequences=2, batch_tokens=16, context_length=110, options=LoadOptions(kv_cache_tokens=130)
    )
    harness.submit(1, LONG + "b", max_tokens=6)
    harness.submit(2, LONG + "c", max_tokens=6)
    harness.step()
    assert harness.engine.stats().running == 2
    harness.run()
    assert harness.engine.stats().preemptions == 0
    assert cached(harness, 2) == 100


def test_prefix_that_runs_already_needs_no_room_for_a_second_one():
    """Idle tokens that a running sequence shares are in the pool whatever comes: only the rest is new."""
    harness = Harness(
        max_sequences=2, batch_tokens=64, context_length=110, options=LoadOptions(kv_cache_tokens=130)
    )
    harness.submit(1, LONG + "a" * 5, max_tokens=0)
    harness.run()
    harness.submit(2, LONG + "b", max_tokens=6)
    harness.submit(3, LONG + "c", max_tokens=6)
    harness.step()
    assert harness.engine.stats().running == 2


class Windowed(SpyBackend):
    """Refuses to cut, as a sliding-window model does after a copy between streams."""

    def kv_remove(self, sequence_id: int, start: int) -> bool:
        if 0 < start < self.kv_length(sequence_id):
            return False
        return super().kv_remove(sequence_id, start)

    def kv_copy(self, source: int, target: int, length: int) -> bool:
        return length == self.kv_length(source) and super().kv_copy(source, target, length)


@pytest.mark.parametrize("slots", [1, 2])
def test_prefix_that_cannot_be_cut_is_computed_again(slots):
    """All other places are taken: the one with the prefix must be emptied, it cannot be kept beside."""
    options = LoadOptions(kv_unified=False)
    harness = Harness(max_sequences=slots, batch_tokens=64, options=options, kind=Windowed)
    if slots == 2:
        harness.submit(0, "other", max_tokens=50)
        harness.step()
    harness.submit(1, LONG, max_tokens=2)
    while not harness.endings(1):
        harness.step()
    harness.submit(2, "p" * 60 + "x", max_tokens=2)
    harness.run()
    assert harness.result(2) == alone("p" * 60 + "x", max_tokens=2)
    assert cached(harness, 2) == 0


# ---- any history ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Accident:
    """What happens before a step, to which sequence."""

    at: int
    kind: str
    place: int


ACCIDENTS = st.lists(
    st.builds(
        Accident,
        at=st.integers(0, 25),
        kind=st.sampled_from(["cancel", "abort", "no room", "fail", "stall", "credit"]),
        place=st.integers(0, 5),
    ),
    max_size=10,
)


class History:
    """Accidents, step by step; scripted outcomes come one after the other."""

    def __init__(self, accidents: list[Accident], num_sequences: int) -> None:
        self._accidents = accidents
        self._num_sequences = num_sequences
        self._scripted_until = 0

    def __call__(self, harness: Harness, step: int) -> None:
        for accident in self._accidents:
            if accident.at == step:
                self._happen(harness, accident)

    def _happen(self, harness: Harness, accident: Accident) -> None:
        id = accident.place % self._num_sequences
        if accident.kind == "cancel":
            harness.engine.cancel(id)
        elif accident.kind == "credit":
            harness.engine.add_credit(id, 3)
        elif accident.kind == "stall":
            harness.clock.advance(31)
        else:
            outcomes = {
                "abort": [Outcome.ABORTED],
                "no room": [Outcome.NO_KV_ROOM] * (1 + accident.place),
                "fail": [Outcome.FAILED, Outcome.DONE],
            }[accident.kind]
            if len(harness.backend.batches) >= self._scripted_until:
                harness.backend.fail_next(*outcomes, kept=accident.place)
                self._scripted_until = len(harness.backend.batches) + len(outcomes)


def check_history(arrivals: list[Request], shape: Shape, accidents: list[Accident], credit: int) -> None:
    history = History(accidents, len(arrivals))
    harness = shape.harness()
    number = 0

    def step() -> bool:
        nonlocal number
        history(harness, number)
        number += 1
        return harness.step()

    try:
        for id, request in enumerate(arrivals):
            for _ in range(request.arrives):
                step()
            harness.submit(id, request.prompt, credit=credit, **request.keywords())
        for _ in range(1000):
            if not step() and not harness.engine.stats().running:
                break
            if number % 20 == 0:
                harness.clock.advance(31)  # whoever is stalled now has stalled for too long
    except EngineBroken:
        return  # its sequences have their endings, the process ends; see the test of it
    for id, request in enumerate(arrivals):
        result = harness.result(id)
        full = expected(request)
        if result.reason is None:
            assert full.ids[: len(result.ids)] == result.ids
            reason = None if result.error is None else result.error.reason
            assert reason in (None, "INTERNAL", "SLOW_CONSUMER")
        else:
            assert result == full
    assert harness.is_clean()


@settings(max_examples=150)
@given(arrivals=ARRIVALS, shape=SHAPES, accidents=ACCIDENTS, credit=st.sampled_from([2, 100]))
def test_history_of_any_accidents_ends_every_sequence_once_and_leaves_nothing(
    arrivals, shape, accidents, credit
):
    check_history(arrivals, shape, accidents, credit)


@pytest.mark.slow
@settings(max_examples=3000)
@given(arrivals=ARRIVALS, shape=SHAPES, accidents=ACCIDENTS, credit=st.sampled_from([2, 100]))
def test_very_many_histories_end_every_sequence_once_and_leave_nothing(arrivals, shape, accidents, credit):
    check_history(arrivals, shape, accidents, credit)
