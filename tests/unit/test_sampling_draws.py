"""Mirostat and adaptive-p, step by step, against their definitions in plain Python."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from bear_grpc.engine import sampling
from bear_grpc.engine.draws import AdaptiveP, Mirostat, SteeredDraw
from bear_grpc.params import SamplingParams
from bear_grpc.testing import FakeSampler

N_VOCAB = 300
IDS = np.arange(1000, 1000 + N_VOCAB, dtype=np.int32)


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def fall(chances: list[float], at: float) -> int:
    total = 0.0
    for place, chance in enumerate(chances):
        total += chance
        if total > at:
            return place
    return len(chances) - 1


class ReferenceMirostat1:
    def __init__(self, tau: float, eta: float) -> None:
        self.tau, self.eta, self.mu = tau, eta, 2 * tau

    def step(self, logits: list[float], at: float) -> int:
        order = sorted(range(len(logits)), key=lambda place: -logits[place])
        chances = softmax([logits[place] for place in order])
        products = squares = 0.0
        for i in range(min(99, len(order) - 1)):
            t, b = math.log((i + 2) / (i + 1)), math.log(chances[i] / chances[i + 1])
            products, squares = products + t * b, squares + t * t
        s = products / squares
        epsilon = s - 1
        k = int(((epsilon * 2**self.mu) / (1 - len(logits) ** -epsilon)) ** (1 / s))
        kept = order[: max(1, min(k, len(order)))]
        return self.finish(logits, kept, at)

    def finish(self, logits: list[float], kept: list[int], at: float) -> int:
        chances = softmax([logits[place] for place in kept])
        place = fall(chances, at)
        self.mu -= self.eta * (-math.log2(chances[place]) - self.tau)
        return kept[place]


class ReferenceMirostat2(ReferenceMirostat1):
    def step(self, logits: list[float], at: float) -> int:
        chances = softmax(logits)
        kept = [place for place, chance in enumerate(chances) if -math.log2(chance) <= self.mu]
        return self.finish(logits, kept or [chances.index(max(chances))], at)


class ReferenceAdaptiveP:
    def __init__(self, target: float, decay: float) -> None:
        self.target, self.decay = target, decay
        self.weighted, self.total = target / (1 - decay), 1 / (1 - decay)

    def step(self, logits: list[float], at: float) -> int:
        chances = softmax(logits)
        aim = min(1.0, max(0.0, 2 * self.target - self.weighted / self.total))
        changed = []
        for chance in chances:
            distance = abs((chance - aim) / 0.3)
            changed.append(5 - 10 * distance**2 / (1 + distance))
        place = fall(softmax(changed), at)
        self.weighted = chances[place] + self.decay * self.weighted
        self.total = 1 + self.decay * self.total
        return place


CASES = [
    *((1, tau, eta) for tau, eta in [(5.0, 0.1), (3.0, 0.5), (1.0, 1.0)]),
    *((2, tau, eta) for tau, eta in [(5.0, 0.1), (2.0, 0.7), (0.0, 0.1), (12.0, 1.0)]),
]


@pytest.mark.parametrize(("version", "tau", "eta"), CASES)
def test_mirostat_draws_and_learns_step_by_step_as_defined(version, tau, eta):
    rng, random_row = random.Random(version), np.random.default_rng(version)
    steered = Mirostat(SamplingParams(mirostat=version, mirostat_tau=tau, mirostat_eta=eta))
    expected = (ReferenceMirostat1 if version == 1 else ReferenceMirostat2)(tau, eta)
    for _ in range(60):
        logits, at = random_row.normal(0, 2, N_VOCAB).astype(np.float32), rng.random()
        token = steered.draw(IDS, logits, at, N_VOCAB)
        assert token - 1000 == expected.step(logits.tolist(), at)
        steered.accept(token)
        assert steered.state == pytest.approx(expected.mu, abs=1e-4)


@pytest.mark.parametrize(("target", "decay"), [(0.5, 0.9), (0.0, 0.5), (1.0, 0.99), (0.2, 0.0)])
def test_adaptive_p_draws_and_learns_step_by_step_as_defined(target, decay):
    rng, random_row = random.Random(7), np.random.default_rng(7)
    steered = AdaptiveP(SamplingParams(adaptive_p_target=target, adaptive_p_decay=decay))
    expected = ReferenceAdaptiveP(target, decay)
    for _ in range(60):
        logits, at = random_row.normal(0, 4, 20).astype(np.float32), rng.random()
        token = steered.draw(IDS[:20], logits, at, N_VOCAB)
        assert token - 1000 == expected.step(logits.tolist(), at)
        steered.accept(token)
        assert steered.state == pytest.approx(expected.weighted, abs=1e-5)
        assert expected.total == pytest.approx(1 / (1 - decay))


STEERED = {
    "mirostat 1": Mirostat(SamplingParams(mirostat=1)),
    "mirostat 1 far up": Mirostat(SamplingParams(mirostat=1, mirostat_tau=100.0)),
    "mirostat 2": Mirostat(SamplingParams(mirostat=2)),
    "adaptive-p": AdaptiveP(SamplingParams(adaptive_p_target=0.5)),
}


@pytest.mark.parametrize("steered", STEERED.values(), ids=STEERED)
@pytest.mark.parametrize(
    "logits",
    [
        [1.0],
        [1.0, -np.inf],
        [-np.inf, 1.0, -np.inf, 1.0],
        [0.0] * 300,
        [1000.0, *[0.0] * 200],
        [3e38, -3e38],
        [place / 10_000 for place in range(300)],
        [math.log(2), 0.0],
    ],
    ids=["one", "one counts", "two count", "equal", "one far above", "limits", "nearly equal", "exponent 1"],
)
def test_steered_draw_of_extreme_rows_gives_a_token_that_can_be_drawn(steered: SteeredDraw, logits):
    for at in (0.0, 0.3, 1 - 2**-53):
        token = steered.draw(IDS[: len(logits)], np.asarray(logits), at, N_VOCAB)
        assert logits[token - 1000] > -np.inf
        steered.accept(token)
        assert math.isfinite(steered.state)


def test_steered_draw_learns_from_the_drawn_token_only_and_once():
    steered = Mirostat(SamplingParams(mirostat=2))
    logits = np.zeros(10, np.float32)
    before = steered.state
    token = steered.draw(IDS[:10], logits, 0.5, N_VOCAB)
    assert steered.state == before
    steered.accept(token + 1)
    assert steered.state == before
    steered.accept(token)
    assert steered.state == before
    steered.accept(steered.draw(IDS[:10], logits, 0.5, N_VOCAB))
    assert steered.state != before


@pytest.mark.parametrize("change", [{"mirostat": 1}, {"mirostat": 2}, {"adaptive_p_target": 0.3}])
def test_state_carried_to_another_sampler_goes_on_with_the_same_tokens(change):
    params = SamplingParams(seed=5, temperature=1.5, **change)
    rows = np.random.default_rng(1).normal(0, 2, (40, 60)).astype(np.float32)
    first = sampling.TokenSampler(params, FakeSampler(params))
    tokens = []
    for position in range(20):
        tokens.append(first.choose(rows[position], position))
        first.accept(tokens[-1])
    second = sampling.TokenSampler(params, FakeSampler(params))
    initial = second.state
    second.accept_prompt(tokens)
    assert second.state == initial
    second.state = first.state
    assert second.state != initial
    for position in range(20, 40):
        token = first.choose(rows[position], position)
        assert second.choose(rows[position], position) == token
        first.accept(token)
        second.accept(token)


@pytest.mark.parametrize("change", [{}, {"mirostat": 2, "temperature": 0.0}])
def test_state_of_a_plain_draw_is_none(change):
    params = SamplingParams(**change)
    sampler = sampling.TokenSampler(params, FakeSampler(params))
    sampler.state = 1.0
    assert sampler.state is None
