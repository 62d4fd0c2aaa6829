"""The draw: a uniform number without state, and the token that it falls on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.engine import sampling
from bear_grpc.testing import FakeSampler
from bear_grpc.types import MAX_SEED, SamplingParams

BELOW_ONE = 1 - 2**-53
SEEDS = st.integers(0, MAX_SEED)
SMALL = st.integers(0, 2**20)


def draw(chances: list[float], at: float) -> int:
    """The place that is drawn, of tokens that are numbered from 100 on."""
    ids = np.arange(100, 100 + len(chances), dtype=np.int32)
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(chances, np.float32))
    return sampling.draw(ids, logits, at) - 100


@given(seed=SEEDS, index=SMALL, position=SMALL)
def test_uniform_any_arguments_give_a_number_from_0_to_below_1(seed, index, position):
    assert 0 <= sampling.uniform(seed, index, position) < 1


def test_uniform_known_arguments_give_the_numbers_of_every_release():
    """The draws of a seed are a promise to clients: another generator would break it."""
    assert [sampling.uniform(0, 0, 0), sampling.uniform(42, 1, 7), sampling.uniform(MAX_SEED, 0, 1)] == [
        _reference(0, 0, 0),
        _reference(42, 1, 7),
        _reference(MAX_SEED, 0, 1),
    ]


def _reference(seed: int, index: int, position: int) -> float:
    """SplitMix64 of its published C code, with numpy's wrapping 64-bit integers, chained over the three."""
    state = 0
    for part in (seed, index, position):
        with np.errstate(over="ignore"):
            z = np.uint64(state ^ part) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = int(z ^ (z >> np.uint64(31)))
    return (state >> 11) / 2**53


@pytest.mark.parametrize("changed", range(3), ids=["seed", "index", "position"])
def test_uniform_any_argument_changed_gives_an_unrelated_number(changed):
    base = [5, 0, 9]
    numbers = []
    for value in range(2000):
        base[changed] = value
        numbers.append(sampling.uniform(*base))
    assert len(set(numbers)) == 2000
    # Neighbours are uncorrelated: the coefficient of 2,000 pairs lies within 4 / sqrt(2000).
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.09


def test_uniform_many_positions_are_spread_evenly():
    numbers = [sampling.uniform(1, 0, position) for position in range(10_000)]
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    # Chi-square with 49 degrees of freedom: above 85.4 once in 1,000 for a good generator.
    assert ((counts - 200) ** 2 / 200).sum() < 85.4


@given(
    chances=st.lists(st.floats(0.01, 1), min_size=1, max_size=8),
    at=st.floats(0, 1, exclude_max=True),
)
def test_draw_gives_the_first_token_whose_cumulated_chance_is_above(chances, at):
    logits = np.log(np.asarray(chances, np.float32)).astype(np.float64)
    sums = np.cumsum(np.exp(logits - logits.max()))
    wanted = at * sums[-1]
    place = draw(chances, at)
    assert sums[place] > wanted
    assert place == 0 or sums[place - 1] <= wanted


def test_draw_at_0_skips_what_cannot_be_drawn():
    assert draw([0, 0, 0.5, 0.5], 0.0) == 2


def test_draw_just_below_1_gives_the_last_that_can_be_drawn():
    assert draw([0.3, 0.7, 0, 0], BELOW_ONE) == 1


def test_draw_at_1_stays_inside_the_candidates():
    assert draw([0.5, 0.5], 1.0) == 1


def test_draw_huge_logits_do_not_overflow():
    ids = np.asarray([7, 8], np.int32)
    assert sampling.draw(ids, np.asarray([1e30, -1e30], np.float32), BELOW_ONE) == 7


def test_draw_known_distribution_is_met():
    chances = np.asarray([0.5, 0.25, 0.15, 0.07, 0.03])
    drawn = [draw(list(chances), sampling.uniform(3, 0, position)) for position in range(4000)]
    counts = np.bincount(drawn, minlength=len(chances))
    # Chi-square with 4 degrees of freedom: above 18.5 once in 1,000.
    assert ((counts - 4000 * chances) ** 2 / (4000 * chances)).sum() < 18.5


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        (SamplingParams(temperature=0, repetition_penalty=1), True),
        (SamplingParams(temperature=0, repetition_penalty=1.1, repetition_window=0), True),
        (SamplingParams(temperature=0, repetition_penalty=1.1), False),
        (SamplingParams(temperature=0, repetition_penalty=1, frequency_penalty=0.1), False),
        (SamplingParams(temperature=0, repetition_penalty=1, presence_penalty=-0.1), False),
        (SamplingParams(temperature=0, repetition_penalty=1, logit_bias=((1, 1.0),)), True),
        (SamplingParams(temperature=0.1, repetition_penalty=1), False),
    ],
)
def test_plain_greedy_holds_only_without_filters(params, plain):
    assert sampling.is_plain_greedy(params) is plain


def test_choose_without_sampler_takes_the_maximum():
    logits = np.asarray([1, 3, 2], np.float32)
    assert sampling.choose(SamplingParams(temperature=0), None, logits, 0) == 1


@pytest.mark.parametrize("with_sampler", [True, False])
def test_choose_greedy_with_bias_takes_the_changed_maximum(with_sampler):
    params = SamplingParams(temperature=0, repetition_penalty=1, logit_bias=((2, 1.0), (2, 0.5), (0, -1.0)))
    logits = np.asarray([1, 3, 2], np.float32)
    sampler = FakeSampler(params) if with_sampler else None
    assert sampling.choose(params, sampler, logits, 0) == 2
    assert logits.tolist() == [1, 3, 2]


def test_choose_greedy_never_takes_a_token_that_is_ruled_out():
    params = SamplingParams(temperature=0, repetition_penalty=1, logit_bias=((1, float("-inf")),))
    assert sampling.choose(params, None, np.asarray([1, 3, 2], np.float32), 0) == 2


def test_choose_same_seed_and_position_draw_the_same_whatever_came_before():
    params = SamplingParams(seed=11, temperature=2)
    logits = np.random.default_rng(0).normal(0, 1, 50).astype(np.float32)
    fresh = sampling.choose(params, FakeSampler(params), logits, 20)
    sampler = FakeSampler(params)
    for position in range(20):
        sampling.choose(params, sampler, logits, position)
    assert sampling.choose(params, sampler, logits, 20) == fresh


def test_choose_other_positions_draw_different_tokens():
    params = SamplingParams(seed=11, temperature=100, top_k=0, top_p=1)
    logits = np.zeros(1000, np.float32)
    sampler = FakeSampler(params)
    assert len({sampling.choose(params, sampler, logits, position) for position in range(50)}) > 40
