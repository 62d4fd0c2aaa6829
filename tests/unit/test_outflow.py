"""How quickly places become free, and when the refused come again: on times that are given."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.outflow import LEAST_RETRY_S, MEMORY_S, MOST_APART_S, MOST_RETRY_S, Outflow

amounts = st.floats(0, 1e6)
spans = st.floats(0, 1e4)


def steady(per_s: float, seconds: float = 10 * MEMORY_S, outflow: Outflow | None = None) -> Outflow:
    """One leaves at a time."""
    made = outflow or Outflow(1.0)
    for _ in range(int(seconds * per_s)):
        made.add(1, 1 / per_s)
    return made


@pytest.mark.parametrize("per_s", [0.2, 1, 7, 400])
def test_a_steady_rate_is_found(per_s):
    assert steady(per_s).seconds(10) == pytest.approx(10 / per_s, rel=0.1)


def test_until_something_has_left_the_assumed_rate_counts():
    outflow = Outflow(4.0)
    assert (outflow.is_measured, outflow.seconds(2)) == (False, 0.5)
    outflow.add(0, 1)
    assert not outflow.is_measured
    outflow.add(1, 0)
    assert outflow.is_measured


def test_the_assumed_rate_hardly_matters_after_a_while():
    slow, fast = (steady(5.0, MEMORY_S, Outflow(assumed)) for assumed in (0.5, 5.0))
    assert slow.seconds(1) == pytest.approx(fast.seconds(1), rel=0.1)


def test_what_lies_far_back_is_forgotten():
    outflow = steady(10.0)
    steady(1.0, 3 * MEMORY_S, outflow)
    assert outflow.seconds(1) == pytest.approx(1, rel=0.4)


def test_a_queue_that_stands_still_takes_longer_and_longer():
    outflow = steady(10.0)
    seen = []
    for _ in range(5):
        seen.append(outflow.seconds(1))
        outflow.add(0, MEMORY_S)
    assert seen == sorted(set(seen))
    outflow.add(0, math.inf)
    assert outflow.seconds(1) == math.inf


@pytest.mark.parametrize("parts", [1, 2, 1000])
def test_time_may_be_told_in_parts(parts):
    whole, cut = Outflow(2.0), Outflow(2.0)
    whole.add(0, 20)
    for _ in range(parts):
        cut.add(0, 20 / parts)
    assert cut.seconds(1) == pytest.approx(whole.seconds(1))


def test_one_that_is_refused_comes_again_when_there_is_room_for_it():
    assert steady(2.0).retry_s(6, 1, 1000.0) == pytest.approx(3, rel=0.1)


def test_those_refused_together_come_one_after_the_other_as_places_become_free():
    outflow = steady(2.0)
    times = [outflow.retry_s(1, 1, 1000.0) for _ in range(20)]
    apart = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert apart == pytest.approx([0.5] * 19, rel=0.1)


def test_one_that_takes_more_room_keeps_the_next_one_away_for_longer():
    outflow = steady(10.0)
    first = outflow.retry_s(1, 1, 0.0)
    assert outflow.retry_s(1, 5, 0.0) - first == pytest.approx(0.5, rel=0.1)


def test_times_that_have_passed_are_not_waited_for():
    outflow = steady(2.0)
    for _ in range(20):
        outflow.retry_s(1, 1, 1000.0)
    assert outflow.retry_s(1, 1, 1100.0) == pytest.approx(0.5, rel=0.1)


def test_more_than_the_longest_time_holds_share_its_second_half():
    outflow = steady(2.0)
    times = [outflow.retry_s(1, 1, 0.0) for _ in range(1000)]
    first = times.index(max(times))
    assert times[: first + 1] == sorted(times[: first + 1])
    assert min(times[first:]) >= MOST_RETRY_S / 2
    by_second = [sum(second <= time < second + 1 for time in times) for second in range(31, 60)]
    assert max(by_second) < 2 * min(by_second)


def test_nobody_is_told_the_same_time_even_where_nothing_leaves():
    outflow = Outflow(1.0)
    outflow.add(0, math.inf)
    first, second = (outflow.retry_s(1, 1, 5.0) for _ in range(2))
    assert (first, second) == (MOST_RETRY_S - MOST_APART_S, MOST_RETRY_S)


@given(
    assumed=st.floats(0.001, 1e4),
    steps=st.lists(st.tuples(amounts, spans, st.none() | st.tuples(amounts, amounts)), max_size=30),
)
def test_a_retry_is_always_within_its_bounds(assumed, steps):
    outflow, now = Outflow(assumed), 0.0
    for left, seconds, refused in steps:
        outflow.add(left, seconds)
        now += seconds
        if refused is not None:
            assert LEAST_RETRY_S <= outflow.retry_s(*refused, now) <= MOST_RETRY_S
