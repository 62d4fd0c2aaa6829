"""The draw: a uniform number without state, and the token that it falls on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.backend.base import Matcher
from bear_grpc.engine import sampling
from bear_grpc.errors import ConstraintDeadEnd, ModelOutputInvalid
from bear_grpc.params import MAX_SEED, SamplerKind, SamplingParams
from bear_grpc.testing import FakeSampler

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
        (SamplingParams(temperature=0, repetition_penalty=1, dry_multiplier=0.1), False),
        (SamplingParams(temperature=0, repetition_penalty=1, dry_multiplier=0.1, dry_window=0), True),
        (SamplingParams(temperature=0, sampler_order=(SamplerKind.TEMPERATURE,)), True),
        (SamplingParams(temperature=0, repetition_penalty=1, mirostat=2), True),
        (SamplingParams(temperature=0, repetition_penalty=1, xtc_probability=1, min_p=0.5), True),
    ],
)
def test_plain_greedy_holds_only_without_filters(params, plain):
    assert sampling.is_plain_greedy(params) is plain


def sampler_of(params: SamplingParams, matcher: Matcher | None = None) -> sampling.TokenSampler:
    filters = None if sampling.is_plain_greedy(params) else FakeSampler(params)
    return sampling.TokenSampler(params, filters, matcher)


def row(*logits: float) -> np.ndarray:
    return np.asarray(logits, np.float32)


def banned(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, np.int32)


GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
WIDE = SamplingParams(temperature=100, top_k=0, top_p=1, repetition_penalty=1, seed=11)
# Greedy with a penalty that no test meets: the filters' path with plain greedy's answers.
FILTERED = SamplingParams(temperature=0, repetition_penalty=1, presence_penalty=0.5)


@pytest.mark.parametrize("params", [GREEDY, FILTERED])
def test_choose_greedy_takes_the_maximum_and_of_equal_ones_the_first(params):
    assert sampler_of(params).choose(row(1, 3, 2), 0) == 1
    assert sampler_of(params).choose(row(1, 3, 2, 3), 0) == 1


@pytest.mark.parametrize("with_sampler", [True, False])
def test_choose_greedy_with_bias_takes_the_changed_maximum(with_sampler):
    params = SamplingParams(temperature=0, repetition_penalty=1, logit_bias=((2, 1.0), (2, 0.5), (0, -1.0)))
    logits = row(1, 3, 2)
    sampler = sampling.TokenSampler(params, FakeSampler(params) if with_sampler else None)
    assert sampler.choose(logits, 0) == 2
    assert logits.tolist() == [1, 3, 2]


def test_choose_greedy_never_takes_a_token_that_is_ruled_out():
    params = SamplingParams(temperature=0, repetition_penalty=1, logit_bias=((1, float("-inf")),))
    assert sampler_of(params).choose(row(1, 3, 2), 0) == 2


def test_choose_greedy_takes_the_lowest_of_equal_candidates_in_any_order():
    filters = RecordingFilters()
    filters.candidates = lambda logits, xtc=False: (banned(0, 7, 3, 5), row(1, 2, 2, 2))
    assert sampling.TokenSampler(FILTERED, filters).choose(np.zeros(9, np.float32), 0) == 3


@pytest.mark.parametrize("change", [{}, {"mirostat": 1}, {"mirostat": 2}, {"adaptive_p_target": 0.5}])
def test_choose_of_an_infinite_logit_takes_it(change):
    sampler = sampling.TokenSampler(SamplingParams(**change), RecordingFilters())
    assert {sampler.choose(row(1, np.inf, 2), position) for position in range(10)} == {1}


def test_choose_greedy_with_penalties_counts_what_was_accepted_and_the_prompt():
    params = SamplingParams(temperature=0, repetition_penalty=1, presence_penalty=2)
    sampler = sampler_of(params)
    sampler.accept_prompt([1])
    assert sampler.choose(row(1, 3, 2), 0) == 2
    sampler.accept(2)
    assert sampler.choose(row(1.5, 3, 2), 1) == 0


@pytest.mark.parametrize(("window", "counted"), [(2, [7, 8]), (-1, [5, 6, 7, 8]), (0, []), (9, [5, 6, 7, 8])])
def test_accept_prompt_counts_only_what_the_windows_hold(window, counted):
    params = SamplingParams(repetition_window=window)
    filters = RecordingFilters()
    sampling.TokenSampler(params, filters).accept_prompt([5, 6, 7, 8])
    assert filters.accepted == counted


class RecordingFilters(FakeSampler):
    """Leaves everything as it is, and tells what it was asked."""

    def __init__(self) -> None:
        super().__init__(WIDE)
        self.accepted: list[int] = []
        self.xtc: list[bool] = []

    def candidates(self, logits, *, xtc=False):
        self.xtc.append(xtc)
        return np.flatnonzero(logits > -np.inf).astype(np.int32), logits[logits > -np.inf]

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_choose_same_seed_and_position_draw_the_same_whatever_came_before():
    params = SamplingParams(seed=11, temperature=2)
    logits = np.random.default_rng(0).normal(0, 1, 50).astype(np.float32)
    fresh = sampler_of(params).choose(logits, 20)
    sampler = sampler_of(params)
    for position in range(20):
        sampler.choose(logits, position)
    assert sampler.choose(logits, 20) == fresh


def test_choose_other_positions_draw_different_tokens():
    logits = np.zeros(1000, np.float32)
    sampler = sampler_of(WIDE)
    assert len({sampler.choose(logits, position) for position in range(50)}) > 40


@pytest.mark.parametrize("params", [GREEDY, FILTERED, WIDE])
def test_choose_never_takes_a_banned_token(params):
    sampler = sampler_of(params)
    logits = row(1, 9, 2, 8)
    assert {sampler.choose(logits, place, banned(1, 3)) for place in range(30)} <= {0, 2}
    assert logits.tolist() == [1, 9, 2, 8]


@pytest.mark.parametrize("params", [GREEDY, FILTERED, WIDE])
def test_choose_with_all_banned_is_a_dead_end(params):
    with pytest.raises(ConstraintDeadEnd):
        sampler_of(params).choose(row(1, 2), 0, banned(0, 1))


@pytest.mark.parametrize("params", [GREEDY, FILTERED, WIDE])
def test_choose_of_no_numbers_tells_that_the_model_is_spoiled(params):
    with pytest.raises(ModelOutputInvalid):
        sampler_of(params).choose(row(np.nan, np.nan), 0)


@pytest.mark.parametrize("params", [GREEDY, FILTERED, WIDE])
def test_choose_never_takes_what_is_no_number(params):
    sampler = sampler_of(params)
    assert {sampler.choose(row(np.nan, 1, np.nan), position) for position in range(20)} == {1}


class Letters:
    """A matcher that spells its words; tokens are numbers, and `end` may come after a whole word."""

    def __init__(self, words: list[list[int]], end: int = 99) -> None:
        self.words, self.end, self.text = words, end, []
        self.asked: list[int] = []
        self.masks = 0

    def _next(self) -> set[int]:
        count = len(self.text)
        fitting = [word for word in self.words if word[:count] == self.text]
        whole = {self.end} if self.text in self.words else set()
        return {word[count] for word in fitting if len(word) > count} | whole

    def allows(self, token: int) -> bool:
        self.asked.append(token)
        return token in self._next()

    def mask(self, logits):
        self.masks += 1
        masked = np.full_like(logits, -np.inf)
        for token in self._next():
            if token < len(logits):
                masked[token] = logits[token]
        return masked

    def accept(self, token: int) -> None:
        assert token in self._next()
        self.text = [*self.text, token]

    def is_satisfied(self) -> bool:
        return self.text in self.words

    def is_finished(self) -> bool:
        return self._next() <= {self.end} and self.is_satisfied()

    def copy(self):
        raise NotImplementedError


@pytest.mark.parametrize("params", [GREEDY, FILTERED])
def test_choose_with_a_winner_that_is_allowed_never_masks(params):
    matcher = Letters([[1, 2]])
    assert sampler_of(params, matcher).choose(row(0, 5, 1), 0) == 1
    assert (matcher.asked, matcher.masks) == ([1], 0)


@pytest.mark.parametrize("params", [GREEDY, FILTERED, WIDE])
def test_choose_with_a_winner_that_is_refused_takes_an_allowed_one(params):
    matcher = Letters([[2], [0]])
    chosen = {sampler_of(params, matcher).choose(row(1, 300, 2), position) for position in range(20)}
    assert chosen == ({2} if params.temperature == 0 else {0, 2})
    assert matcher.masks == 20


def test_choose_again_is_not_bound_to_the_refused_draw():
    """With the first draw's number, only its upper part could follow a refusal: one token would starve."""
    matcher = Letters([[0], [1]])
    # Token 2 has half of all chances, the upper half of the number's range.
    logits = row(0, 0, math.log(2)) * 100
    drawn = [sampler_of(WIDE, matcher).choose(logits, position) for position in range(400)]
    assert {0, 1} == set(drawn)
    # Each has half of the chances, once refused tokens are drawn again: 400 tosses of a coin.
    assert abs(drawn.count(0) - 200) < 4 * 10


@pytest.mark.parametrize("params", [GREEDY, FILTERED, WIDE])
def test_choose_with_all_that_may_come_banned_is_a_dead_end(params):
    with pytest.raises(ConstraintDeadEnd):
        sampler_of(params, Letters([[2]])).choose(row(1, 3, 2), 0, banned(2))


def test_choose_with_the_only_way_lowered_without_bound_takes_it():
    """DRY may subtract more than float32 holds: that is no dead end of the constraint."""
    filters = RecordingFilters()
    filters.candidates = lambda logits, xtc=False: (banned(2), row(-np.inf))
    sampler = sampling.TokenSampler(WIDE, filters, Letters([[2]]))
    assert sampler.choose(row(1, 3, 2), 0) == 2


def test_accept_goes_on_in_the_constraint_and_takes_its_end():
    sampler = sampler_of(GREEDY, Letters([[1], [1, 2]], end=3))
    assert (sampler.satisfied, sampler.finished) == (False, False)
    sampler.accept_prompt([7, 7])
    sampler.accept(1)
    assert (sampler.satisfied, sampler.finished) == (True, False)
    assert sampler.choose(row(9, 9, 0, 1), 1) == 3
    sampler.accept(3)


def test_satisfied_without_a_constraint_is_unknown_and_never_finished():
    sampler = sampler_of(GREEDY)
    assert (sampler.satisfied, sampler.finished) == (None, False)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 300), (0.3, 90)])
def test_xtc_works_as_often_as_it_should(probability, expected):
    params = SamplingParams(xtc_probability=probability, seed=4)
    filters = RecordingFilters()
    sampler = sampling.TokenSampler(params, filters)
    for position in range(300):
        sampler.choose(row(1, 2), position)
    # Within 4 standard deviations of a coin with this probability.
    assert abs(sum(filters.xtc) - expected) <= 4 * math.sqrt(300 * probability * (1 - probability))


def test_xtc_chance_is_another_number_than_the_draw():
    params = SamplingParams(xtc_probability=0.5, seed=4)
    filters = RecordingFilters()
    sampler = sampling.TokenSampler(params, filters)
    drawn = [sampler.choose(row(0, 0), position) for position in range(400)]
    both = sum(works == (token == 1) for works, token in zip(filters.xtc, drawn, strict=True))
    assert abs(both - 200) < 4 * 10


def test_close_frees_the_filters_once():
    filters = FakeSampler(WIDE)
    sampler = sampling.TokenSampler(WIDE, filters)
    sampler.close()
    sampler.close()
    assert filters.closed
