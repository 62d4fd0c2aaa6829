"""The first law: what a sequence gives does not depend on what runs beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.backend.base import Outcome
from bear_grpc.engine.engine import EngineBroken
from bear_grpc.params import SamplingParams, StopParams
from bear_grpc.types import LoadOptions
from tests.engine.harness import GREEDY, Harness, Result, alone

SAMPLINGS = [
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=1.5, top_k=0, repetition_window=3),
    SamplingParams(seed=3, temperature=0, repetition_penalty=1.5, repetition_window=-1),
    SamplingParams(seed=4, min_p=0.2, typical_p=0.7, frequency_penalty=1, logit_bias=((65, 5.0),)),
]
STOPS = [
    StopParams(ignore_eos=True),
    StopParams(),
    StopParams(token_ids=tuple(range(0, 256, 16))),
    StopParams(sequences=("a", "\ufffd\ufffd")),
]


@dataclasses.dataclass(frozen=True)
class Request:
    """One request; it is submitted after `arrives` steps more than the one before it."""

    prompt: str
    sampling: int
    stop: int
    max_tokens: int
    arrives: int

    def keywords(self) -> dict[str, object]:
        return {
            "sampling": SAMPLINGS[self.sampling],
            "stop": STOPS[self.stop],
            "max_tokens": self.max_tokens,
        }


# Long common beginnings, so that prefixes are shared while they are computed and afterwards.
PROMPTS = st.builds(
    lambda start, length, end: (start * 60)[:length] + end,
    st.sampled_from(["", "a", "ba"]),
    st.sampled_from([0, 9, 40, 60]),
    st.text("ab", min_size=1, max_size=20),
)
REQUESTS = st.builds(
    Request,
    prompt=PROMPTS,
    sampling=st.integers(0, len(SAMPLINGS) - 1),
    stop=st.integers(0, len(STOPS) - 1),
    max_tokens=st.integers(0, 6),
    arrives=st.integers(0, 3),
)
ARRIVALS = st.lists(REQUESTS, min_size=1, max_size=6)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the engine has: few slots and small steps, and all kinds of KV cache."""

    max_sequences: int
    batch_tokens: int
    kv_unified: bool = True
    can_cut: bool = True
    kv_cache_tokens: int = 0
    snapshot_bytes: int = 0

    def harness(self) -> Harness:
        return Harness(
            max_sequences=self.max_sequences,
            batch_tokens=self.batch_tokens,
            context_length=128,
            options=LoadOptions(kv_unified=self.kv_unified, kv_cache_tokens=self.kv_cache_tokens or None),
            can_cut=self.can_cut,
            snapshot_bytes=self.snapshot_bytes,
        )


SHAPES = st.builds(
    lambda size, kind: Shape(*size, *kind),
    st.sampled_from([(1, 4), (2, 2), (3, 8), (3, 5), (3, 40)]),
    st.sampled_from(
        [
            (True, True, 0),
            (True, True, 130),
            (True, True, 130, 10**6),
            (True, True, 0, 600),
            (False, True, 0),
            (False, True, 0, 10**6),
            (False, True, 0, 600),
            (False, False, 0),
            (False, False, 0, 10**6),
        ]
    ),
)


def submit(harness: Harness, id: int, request: Request) -> None:
    harness.submit(id, request.prompt, **request.keywords())


def run(
    arrivals: list[Request],
    shape: Shape,
    between: Callable[[Harness, int], None] = lambda harness, step: None,
) -> Harness:
    """Runs all; `between` is called before each step with its number."""
    harness = shape.harness()
    number = 0

    def step() -> bool:
        nonlocal number
        between(harness, number)
        number += 1
        return harness.step()

    for id, request in enumerate(arrivals):
        for _ in range(request.arrives):
            step()
        submit(harness, id, request)
    for _ in range(2000):
        if not step():
            return harness
    raise AssertionError("the engine does not come to an end")


def expected(request: Request) -> Result:
    return alone(request.prompt, **request.keywords())


@settings(max_examples=150)
@given(arrivals=ARRIVALS, shape=SHAPES)
def test_batch_in_any_arrival_order_gives_what_each_gives_alone(arrivals, shape):
    harness = run(arrivals, shape)
    for id, request in enumerate(arrivals):
        assert harness.result(id) == expected(request)
    assert harness.is_clean()


@pytest.mark.slow
@settings(max_examples=2000)
@given(arrivals=ARRIVALS, shape=SHAPES)
def test_batch_in_very_many_arrival_orders_gives_what_each_gives_alone(arrivals, shape):
    harness = run(arrivals, shape)
    for id, request in enumerate(arrivals):
        assert harness.result(id) == expected(request)


@settings(max_examples=150)
@given(arrivals=ARRIVALS, shape=SHAPES, victim=st.integers(0, 5), at=st.integers(0, 30))
def test_cancel_at_any_step_ends_that_sequence_and_leaves_the_others_unchanged(arrivals, shape, victim, at):
    """The victim's output up to the cancel is the beginning of what it gives alone."""
    victim %= len(arrivals)

    def between(harness: Harness, step: int) -> None:
        if step == at:
            harness.engine.cancel(victim)

    harness = run(arrivals, shape, between)
    for id, request in enumerate(arrivals):
        result = harness.result(id)
        if id == victim and result.reason is None:
            assert result.error is None
            assert expected(request).ids[: len(result.ids)] == result.ids
        else:
            assert result == expected(request)
    assert harness.is_clean()


@settings(max_examples=150)
@given(
    arrivals=ARRIVALS,
    shape=SHAPES,
    aborts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), max_size=4),
)
def test_abort_in_any_step_after_any_rows_leaves_all_outputs_unchanged(arrivals, shape, aborts):
    def between(harness: Harness, step: int) -> None:
        for at, kept in aborts:
            if at == step:
                harness.backend.fail_next(Outcome.ABORTED, kept=kept)

    harness = run(arrivals, shape, between)
    for id, request in enumerate(arrivals):
        assert harness.result(id) == expected(request)
    assert harness.is_clean()


@settings(max_examples=150)
@given(
    arrivals=ARRIVALS,
    shape=SHAPES,
    at=st.integers(0, 20),
    kept=st.integers(0, 8),
    outcome=st.sampled_from([Outcome.FAILED, Outcome.INVALID]),
)
def test_failure_in_any_step_ends_only_the_sequences_of_that_step(arrivals, shape, at, kept, outcome):
    failing: list[set[int]] = []

    def between(harness: Harness, step: int) -> None:
        if step == at:
            harness.backend.fail_next(outcome, kept=kept)
            failing.append({id for id in range(len(arrivals)) if not harness.endings(id)})

    harness = run(arrivals, shape, between)
    for id, request in enumerate(arrivals):
        result = harness.result(id)
        if result.error is not None:
            assert result.error.reason == "INTERNAL"
            assert id in failing[0]
            assert expected(request).ids[: len(result.ids)] == result.ids
        else:
            assert result == expected(request)
    assert harness.is_clean()


@settings(max_examples=150)
@given(
    arrivals=ARRIVALS,
    shape=SHAPES,
    at=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), min_size=1, max_size=3),
)
def test_no_room_in_any_step_leaves_all_outputs_unchanged(arrivals, shape, at):
    """Steps are cut and sequences preempted; only one that is alone and finds no room at all fails."""

    def between(harness: Harness, step: int) -> None:
        for number, times in at:
            if number == step:
                harness.backend.fail_next(*[Outcome.NO_KV_ROOM] * times)

    harness = run(arrivals, shape, between)
    for id, request in enumerate(arrivals):
        result = harness.result(id)
        if result.error is not None:
            assert "no room" in result.error.message
            assert expected(request).ids[: len(result.ids)] == result.ids
        else:
            assert result == expected(request)
    assert harness.is_clean()


@settings(max_examples=30)
@given(arrivals=ARRIVALS, shape=SHAPES, stalls=st.lists(st.integers(1, 3), max_size=4))
def test_credit_in_any_lots_leaves_all_outputs_unchanged(arrivals, shape, stalls):
    harness = shape.harness()
    for id, request in enumerate(arrivals):
        harness.submit(id, request.prompt, credit=1, **request.keywords())
    for lot in [*stalls, *[2] * 40]:
        harness.run()
        for id in range(len(arrivals)):
            harness.engine.add_credit(id, lot)
    for id, request in enumerate(arrivals):
        assert harness.result(id) == expected(request)


@given(arrivals=ARRIVALS, shape=SHAPES)
def test_trace_replayed_gives_the_same_batches_and_events(arrivals, shape):
    first, second = run(arrivals, shape), run(arrivals, shape)
    assert first.backend.batches == second.backend.batches
    assert first.steps == second.steps


@given(arrivals=ARRIVALS, shape=SHAPES)
def test_stats_count_every_token_and_every_ending(arrivals, shape):
    harness = run(arrivals, shape)
    stats = harness.engine.stats()
    usages = [harness.result(id).usage for id in range(len(arrivals))]
    assert stats.prefill_tokens + stats.cached_tokens == sum(usage.prompt_tokens for usage in usages)
    assert stats.cached_tokens == sum(harness.result(id).cached for id in range(len(arrivals)))
    assert stats.decode_tokens == sum(usage.completion_tokens for usage in usages)
    assert (stats.submitted, stats.finished) == (len(arrivals), len(arrivals))
    assert stats.steps == len(harness.backend.batches)
    assert harness.steps[-1].stats == stats


@given(arrivals=ARRIVALS, shape=SHAPES)
def test_two_failures_in_a_row_break_the_engine_with_their_endings_told(arrivals, shape):
    harness = shape.harness()
    for id, request in enumerate(arrivals):
        submit(harness, id, request)
    harness.backend.fail_next(Outcome.FAILED, Outcome.FAILED)
    try:
        harness.run()
        broken = False
    except EngineBroken:
        broken = True
    ended = [id for id in range(len(arrivals)) if harness.endings(id)]
    assert [harness.result(id).error.reason for id in ended] == ["INTERNAL"] * len(ended)
    assert len(ended) == sum(len({row[0] for row in batch}) for batch in harness.backend.batches)
    assert broken == (len(harness.backend.batches) == 2)
    assert broken or len(ended) == len(arrivals)
