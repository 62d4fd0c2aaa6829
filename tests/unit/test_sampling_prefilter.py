"""The prefilter's parts: bounds, places of the largest, and the window of seen tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.backend.prefilter import (
    Limit,
    SeenTokens,
    few,
    largest,
    limit_of,
    log_mass_without,
    reached_by,
)
from bear_grpc.params import SamplerKind, SamplingParams

SIZES = st.sampled_from([2048, 2049, 5000, 9000])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(size=SIZES, count=st.integers(1, 300), spread=st.sampled_from([0.5, 3.0]), seed=st.integers(0, 99))
def test_reached_by_gives_a_value_that_so_many_logits_reach(size, count, spread, seed):
    row = np.round(np.random.default_rng(seed).normal(0, spread, size) * 8).astype(np.float32)
    assert (row >= reached_by(row, count)).sum() >= count


def test_reached_by_is_near_to_the_wanted_number():
    row = np.random.default_rng(0).normal(0, 3, 32_000).astype(np.float32)
    for count in (1, 40, 104, 500):
        assert count <= (row >= reached_by(row, count)).sum() <= 1.5 * count


@pytest.mark.parametrize(("size", "count"), [(2047, 1), (32_000, 8_000), (10, 10)])
def test_reached_by_of_too_many_is_no_bound(size, count):
    assert reached_by(np.zeros(size, np.float32), count) == -math.inf


@settings(derandomize=True, max_examples=60, deadline=None)
@given(size=st.sampled_from([1, 5, 2048, 5000]), count=st.integers(0, 400), seed=st.integers(0, 99))
def test_largest_gives_the_places_of_a_stable_sort(size, count, seed):
    values = np.round(np.random.default_rng(seed).normal(0, 3, size)).astype(np.float32)
    assert largest(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@settings(derandomize=True, max_examples=100, deadline=None)
@given(window=st.integers(1, 12), tokens=st.lists(st.integers(0, 8), max_size=60))
def test_seen_tokens_are_the_distinct_ones_of_the_window(window, tokens):
    seen = SeenTokens(window)
    for count, token in enumerate(tokens, start=1):
        seen.add(token)
        expected = sorted({*tokens[max(0, count - window) : count]})
        assert sorted(seen.tokens.tolist()) == expected


def order(*kinds: SamplerKind) -> dict[str, object]:
    return {"sampler_order": kinds}


K, P, MIN = SamplerKind.TOP_K, SamplerKind.TOP_P, SamplerKind.MIN_P


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({}, Limit(40)),
        ({"temperature": 0.0}, Limit(1)),
        ({"temperature": 0.0, "top_k": 0}, Limit(1)),
        ({"dry_multiplier": 1.0, "top_k": 7}, Limit(7)),
        ({"top_n_sigma": 1.0}, None),
        ({"top_k": 0}, Limit(256, divisor=1.0)),
        ({"top_k": 0, "min_p": 0.1, **order(MIN, P), "temperature": 0.5}, Limit(1, 0.01 - math.log(0.1))),
        ({**order(SamplerKind.TEMPERATURE, P), "temperature": 0.5}, Limit(256, divisor=0.5)),
        ({"top_k": 0, "top_p": 1.0}, None),
        ({"mirostat": 1}, None),
        (order(P, K), Limit(256, divisor=1.0)),
        ({**order(SamplerKind.XTC, K), "xtc_probability": 0.5}, None),
        ({**order(SamplerKind.TYPICAL_P, K), "typical_p": 0.5}, None),
        ({**order(SamplerKind.TEMPERATURE, K), "dynamic_temperature_range": 0.5}, None),
        (order(SamplerKind.TEMPERATURE, K), Limit(40)),
        ({**order(MIN, K), "min_p": 0.1, "min_keep": 50}, Limit(50)),
        ({**order(MIN), "min_p": 1.0, "min_keep": 3}, Limit(3, 0.01)),
    ],
)
def test_limit_is_told_only_where_the_filters_do_not_need_the_whole_row(change, limit):
    assert limit_of(SamplingParams(**change)) == limit


def test_few_keeps_seen_tokens_that_are_far_below():
    row = np.zeros(4096, np.float32)
    row[[7, 9]] = 5
    row[100] = -50
    seen = np.asarray([100], np.int32)
    assert few(row, Limit(1), seen).tolist() == [7, 9, 100]
    assert few(row, Limit(1, 1.0), seen).tolist() == [7, 9, 100]


def test_few_of_a_row_without_bound_are_unknown():
    row = np.full(4096, -np.inf, np.float32)
    row[3] = 1
    assert few(row, Limit(2), np.empty(0, np.int32)) is None


def test_log_mass_without_is_that_of_the_others():
    row = np.asarray([1, 2, 3, -np.inf], np.float32)
    expected = math.log(math.exp(1 / 0.5) + math.exp(3 / 0.5))
    assert log_mass_without(row, np.asarray([1]), 0.5) == pytest.approx(expected, abs=1e-6)
    assert log_mass_without(row, np.asarray([0, 1, 2]), 0.5) == -math.inf
