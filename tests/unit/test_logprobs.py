"""Log probabilities of the raw row."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bear_grpc.engine.logprobs import logprobs


def row(*logits: float) -> np.ndarray:
    return np.asarray(logits, np.float32)


def test_logprobs_of_known_chances_are_their_logarithms():
    chances = [0.5, 0.25, 0.125, 0.125]
    chosen, top = logprobs(np.log(row(*chances)) + np.float32(7), 1, 4)
    assert chosen == pytest.approx(math.log(0.25), abs=1e-6)
    assert [token for token, _ in top] == [0, 1, 2, 3]
    assert [math.exp(value) for _, value in top] == pytest.approx(chances, abs=1e-6)


def test_logprobs_equal_ones_are_told_by_id():
    _, top = logprobs(row(1, 2, 2, 0, 2), 0, 3)
    assert [token for token, _ in top] == [1, 2, 4]


@pytest.mark.parametrize("size", [10, 3000, 100_000])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_of_any_vocabulary_are_those_of_a_sort(size, count):
    # Quarters: many of them are equal.
    logits = np.round(np.random.default_rng(size).normal(0, 4, size) * 4).astype(np.float32) / 4
    exact = logits.astype(np.float64)
    exact = exact - exact.max()
    exact -= math.log(math.fsum(np.exp(exact)))
    chosen, top = logprobs(logits, size // 2, count)
    assert chosen == pytest.approx(exact[size // 2], abs=1e-6)
    order = sorted(range(size), key=lambda token: (-exact[token], token))[:count]
    assert [token for token, _ in top] == order
    assert [value for _, value in top] == pytest.approx([exact[token] for token in order], abs=1e-6)


def test_logprobs_huge_logits_do_not_overflow():
    chosen, top = logprobs(row(1e30, -1e30, 1e30), 0, 1)
    assert chosen == pytest.approx(-math.log(2))
    assert top == [(0, chosen)]


def test_logprobs_of_a_token_without_chance_are_minus_infinity():
    assert logprobs(row(0, -np.inf), 1, 2) == (-math.inf, [(0, 0.0), (1, -math.inf)])


def test_logprobs_leave_the_row_unchanged():
    logits = row(1, 2, 3)
    logprobs(logits, 0, 2)
    assert logits.tolist() == [1, 2, 3]
