"""Sampling filters against their definitions, on random logits."""

from __future__ import annotations

import numpy as np
import pytest

from bear_grpc.backend.base import Backend, Logits
from bear_grpc.types import SamplingParams
from tests.contract import reference

OFF = SamplingParams(temperature=1, top_k=0, top_p=1, repetition_penalty=1)
SEEN = [3, 3, 3, 9, 10, 3, 9, 100, 101, 102]

CASES: dict[str, dict[str, object]] = {
    "nothing": {},
    "top_k 1": {"top_k": 1},
    "top_k 17": {"top_k": 17},
    "top_k over the vocabulary": {"top_k": 10**6},
    "top_p 0.5": {"top_p": 0.5},
    "top_p 0.99": {"top_p": 0.99},
    "top_p tiny": {"top_p": 1e-6},
    "min_p 0.05": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "typical 0.3": {"typical_p": 0.3},
    "typical 0.9": {"typical_p": 0.9},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 2": {"temperature": 2.0},
    "temperature 0": {"temperature": 0.0},
    "bias": {"logit_bias": ((0, 5.0), (7, -3.5), (7, 1.0))},
    "bias that forbids": {"logit_bias": ((7, float("-inf")),), "temperature": 0.0},
    "repetition": {"repetition_penalty": 1.5},
    "repetition below 1": {"repetition_penalty": 0.5},
    "repetition in a window of 4": {"repetition_penalty": 1.5, "repetition_window": 4},
    "repetition in the whole context": {"repetition_penalty": 1.5, "repetition_window": -1},
    "repetition in a window of 0": {"repetition_penalty": 1.5, "repetition_window": 0},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": -1.3},
    "penalties greedy": {"repetition_penalty": 1.2, "frequency_penalty": 1.0, "temperature": 0.0},
    "defaults": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1},
    "all": {
        "temperature": 1.3,
        "top_k": 50,
        "typical_p": 0.95,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "logit_bias": ((5, 2.0),),
    },
}


def random_logits(backend: Backend, seed: int) -> Logits:
    return np.random.default_rng(seed).normal(0, 4, backend.vocabulary.size).astype(np.float32)


def params_of(case: str) -> SamplingParams:
    return SamplingParams(
        **{name: CASES[case].get(name, getattr(OFF, name)) for name in SamplingParams.__struct_fields__}
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_candidates_are_those_of_the_definition(backend, case, seed):
    params, row = params_of(case), random_logits(backend, seed)
    sampler = backend.make_sampler(params)
    for token in SEEN:
        sampler.accept(token)
    ids, logits = sampler.candidates(row)
    sampler.close()
    expected = reference.candidates(params, row.tolist(), SEEN)
    assert (ids.dtype, logits.dtype) == (np.int32, np.float32)
    assert len(ids) == len(expected)
    assert {*ids.tolist()} == {*expected}
    wanted = np.asarray([expected[token] for token in ids.tolist()])
    assert np.allclose(logits, wanted, rtol=1e-5, atol=1e-4)


def test_candidates_leave_the_row_unchanged(backend):
    row = random_logits(backend, 0)
    before = row.copy()
    sampler = backend.make_sampler(params_of("all"))
    sampler.accept(3)
    sampler.candidates(row)
    sampler.close()
    assert np.array_equal(row, before)


def test_candidates_stay_valid_while_another_sampler_works(backend):
    first, second = backend.make_sampler(params_of("top_k 17")), backend.make_sampler(params_of("min_p 0.05"))
    ids, logits = first.candidates(random_logits(backend, 0))
    kept = ids.copy(), logits.copy()
    second.candidates(random_logits(backend, 1))
    assert np.array_equal(ids, kept[0])
    assert np.array_equal(logits, kept[1])
    first.close()
    second.close()


def test_samplers_count_their_own_sequence_only(backend):
    params, row = params_of("presence"), random_logits(backend, 0)
    first, second = backend.make_sampler(params), backend.make_sampler(params)
    first.accept(3)
    results = []
    for sampler in (first, second):
        ids, logits = sampler.candidates(row)
        results.append(dict(zip(ids.tolist(), logits.tolist(), strict=True)))
        sampler.close()
    assert results[0][3] == pytest.approx(float(row[3]) + 1.3, abs=1e-4)
    assert results[1][3] == pytest.approx(float(row[3]), abs=1e-4)


def test_window_forgets_tokens_that_leave_it(backend):
    params, row = params_of("repetition in a window of 4"), random_logits(backend, 0)
    sampler = backend.make_sampler(params)
    for token in [3, 200, 201, 202, 203]:
        sampler.accept(token)
    ids, logits = sampler.candidates(row)
    sampler.close()
    assert dict(zip(ids.tolist(), logits.tolist(), strict=True))[3] == pytest.approx(float(row[3]), abs=1e-4)
