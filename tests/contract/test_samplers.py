"""Sampling filters against their definitions, on random logits."""

from __future__ import annotations

import ctypes
import math
import random

import numpy as np
import pytest

from bear_grpc.backend.base import Backend, Logits, Sampler
from bear_grpc.engine.draws import AdaptiveP, Mirostat
from bear_grpc.params import SAMPLER_ORDER, SamplerKind, SamplingParams
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
    "top_n_sigma 1": {"top_n_sigma": 1.0},
    "top_n_sigma that keeps all": {"top_n_sigma": 100.0},
    "top_n_sigma, then typical": {"top_n_sigma": 2.0, "typical_p": 0.8},
    "typical beside a bias that takes all": {"typical_p": 0.9, "logit_bias": ((5, 1000.0),)},
    "dynamic temperature": {"temperature": 1.0, "dynamic_temperature_range": 0.7},
    "dynamic temperature to 0": {"temperature": 0.5, "dynamic_temperature_range": 0.9, "top_k": 9},
    "dynamic temperature, exponent": {
        "dynamic_temperature_range": 0.5,
        "dynamic_temperature_exponent": 2.5,
        "top_k": 30,
    },
    "min_keep of top_p": {"top_p": 0.1, "min_keep": 20},
    "min_keep of min_p": {"min_p": 0.9, "min_keep": 20},
    "min_keep of typical": {"typical_p": 0.1, "min_keep": 20},
    "min_keep over top_k": {"min_p": 0.9, "top_k": 5, "min_keep": 20},
    "xtc off by its threshold": {"xtc_probability": 1.0, "xtc_threshold": 0.51},
    "dry": {"dry_multiplier": 0.8},
    "dry up to 3 free": {"dry_multiplier": 0.8, "dry_allowed_length": 3},
    "dry steep": {"dry_multiplier": 100.0, "dry_base": 100.0, "dry_allowed_length": 1, "top_k": 40},
    "dry flat": {"dry_multiplier": 2.0, "dry_base": 1.0, "dry_allowed_length": 1},
    "dry in a window of 4": {"dry_multiplier": 0.8, "dry_window": 4, "dry_allowed_length": 1},
    "dry in a window of 0": {"dry_multiplier": 0.8, "dry_window": 0, "dry_allowed_length": 1},
    "dry greedy": {"dry_multiplier": 5.0, "temperature": 0.0},
    "only temperature in the order": {
        "sampler_order": (SamplerKind.TEMPERATURE,),
        "temperature": 0.5,
        "top_k": 3,
        "repetition_penalty": 2.0,
        "min_p": 0.5,
    },
    "no filter in the order": {"sampler_order": (), "temperature": 0.5, "top_k": 3},
    "mirostat leaves the others out": {
        "mirostat": 2,
        "temperature": 0.7,
        "top_k": 3,
        "repetition_penalty": 1.3,
        "top_n_sigma": 1.0,
    },
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


# A text that repeats, with tokens that FakeVocabulary, byte tokens and pieces make breakers of.
TEXT = [*b"abcab:abcabcababc"]


def random_logits(backend: Backend, seed: int) -> Logits:
    return np.random.default_rng(seed).normal(0, 4, backend.vocabulary.size).astype(np.float32)


def params_of(case: str) -> SamplingParams:
    return SamplingParams(
        **{name: CASES[case].get(name, getattr(OFF, name)) for name in SamplingParams.__struct_fields__}
    )


def check(backend: Backend, params: SamplingParams, row: Logits, seen: list[int], *, xtc: bool = False):
    """Compares a sampler's candidates with those of the definitions."""
    assert params.violations() == [] or not all(math.isfinite(bias) for _, bias in params.logit_bias)
    sampler = backend.make_sampler(params)
    for token in seen:
        sampler.accept(token)
    ids, logits = sampler.candidates(row, xtc=xtc)
    sampler.close()
    breakers = (
        reference.spelled(backend.vocabulary, params.dry_sequence_breakers) if params.dry_multiplier else []
    )
    expected = reference.candidates(params, row.tolist(), seen, breakers, xtc=xtc)
    assert (ids.dtype, logits.dtype) == (np.int32, np.float32)
    if params.temperature == 0:
        # The best is enough: it may be all that is given.
        assert len({*ids.tolist()}) == len(ids)
        assert {*ids.tolist()} <= {*expected}
        assert int(ids[logits.argmax()]) == max(expected, key=expected.__getitem__)
    else:
        assert sorted(ids.tolist()) == sorted(expected)
    wanted = np.asarray([expected[token] for token in ids.tolist()])
    assert np.allclose(logits, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_candidates_are_those_of_the_definition(backend, case, seed):
    seen = TEXT if "dry" in case else SEEN
    check(backend, params_of(case), random_logits(backend, seed), seen)


@pytest.mark.parametrize("xtc", [False, True])
@pytest.mark.parametrize("change", [{}, {"xtc_threshold": 0.02}, {"min_keep": 240}, {"xtc_threshold": 0.0}])
def test_candidates_with_xtc_are_those_of_the_definition(backend, change, xtc):
    params = SamplingParams(
        **{"temperature": 1, "top_k": 30, "top_p": 1, "xtc_probability": 0.5, "xtc_threshold": 0.05} | change
    )
    row = random_logits(backend, 3) / 3
    check(backend, params, row, SEEN, xtc=xtc)


@pytest.mark.parametrize(
    "breakers", [(), (":",), ("c:a", ":"), ("b:", "cab"), ("é", "日本"), ("x" * 40,), (":", "a", "b", "c")]
)
def test_candidates_dry_stops_at_breakers(backend, breakers):
    params = SamplingParams(
        temperature=1,
        top_k=0,
        top_p=1,
        repetition_penalty=1,
        dry_multiplier=1.0,
        dry_allowed_length=1,
        dry_sequence_breakers=breakers,
    )
    vocabulary = backend.vocabulary
    text = vocabulary.tokenize("a cat: a cat, a cat: a c", add_special=False, parse_special=False)
    for end in (len(text), len(text) - 1, len(text) - 3):
        check(backend, params, random_logits(backend, 1), text[:end])


def random_params(rng: random.Random) -> SamplingParams:
    """Every filter on or off, in any order."""
    order = rng.sample(SAMPLER_ORDER, rng.randint(1, len(SAMPLER_ORDER)))
    pick = rng.choice
    return SamplingParams(
        temperature=pick([0.3, 0.8, 1.0, 2.0]),
        top_k=pick([0, 1, 5, 40, 10**6]),
        top_p=pick([1.0, 0.95, 0.5]),
        min_p=pick([0.0, 0.01, 0.2]),
        typical_p=pick([1.0, 0.9, 0.4]),
        repetition_penalty=pick([1.0, 1.3, 0.7]),
        repetition_window=pick([-1, 0, 3, 64]),
        frequency_penalty=pick([0.0, 0.3, -0.5]),
        presence_penalty=pick([0.0, 0.4, -2.0]),
        logit_bias=pick([(), ((5, 12.0), (97, -9.0), (5, 3.0)), ((98, -math.inf), (99, 2.0))]),
        top_n_sigma=pick([0.0, 0.0, 1.5]),
        xtc_probability=pick([0.0, 0.5]),
        xtc_threshold=pick([0.02, 0.2]),
        dry_multiplier=pick([0.0, 0.0, 1.5]),
        dynamic_temperature_range=pick([0.0, 0.0, 0.25]),
        min_keep=pick([1, 1, 7]),
        sampler_order=tuple(order),
    )


@pytest.mark.parametrize("seed", range(40))
def test_candidates_of_any_filters_in_any_order_are_those_of_the_definitions(backend, seed):
    rng = random.Random(seed)
    params, row = random_params(rng), random_logits(backend, seed)
    row[rng.sample(range(len(row)), 30)] = -np.inf
    seen = [rng.choice(TEXT) for _ in range(rng.randint(0, 40))]
    check(backend, params, row, seen, xtc=rng.random() < 0.5)


def test_candidates_without_any_logit_are_none(backend):
    sampler = backend.make_sampler(params_of("all"))
    ids, logits = sampler.candidates(np.full(backend.vocabulary.size, -np.inf, np.float32))
    sampler.close()
    assert (len(ids), len(logits)) == (0, 0)


def test_candidates_never_hold_what_is_no_number(backend):
    row = random_logits(backend, 0)
    row[[3, 50, 100]] = np.nan
    for case in ("defaults", "all", "typical 0.9", "temperature 0", "nothing"):
        sampler = backend.make_sampler(params_of(case))
        sampler.accept(3)
        ids, logits = sampler.candidates(row)
        sampler.close()
        possible = set(ids[logits > -np.inf].tolist())
        assert possible
        assert not possible & {3, 50, 100}


N_WIDE = 4099


@pytest.fixture(scope="module")
def wide():
    """llama.cpp's samplers over a vocabulary of an odd size, with and without the prefilter."""
    from bear_grpc.backend import native, sampler

    native.start()
    shared = sampler.Candidates(N_WIDE)

    def make(params: SamplingParams, *, prefilter: bool) -> Sampler:
        return sampler.LlamaSampler(
            params, shared, vocab=None, n_vocab=N_WIDE, context_length=256, prefilter=prefilter
        )

    return make


SHAPES = {
    "defaults": {},
    "defaults greedy": {"temperature": 0.0},
    "k 1": {"top_k": 1},
    "k 200": {"top_k": 200, "top_p": 0.999},
    "k over the groups": {"top_k": 1000},
    "k over the vocabulary": {"top_k": 10**6},
    "k after a temperature": {
        "sampler_order": (SamplerKind.TEMPERATURE, SamplerKind.PENALTIES, SamplerKind.TOP_K)
    },
    "k after min_p": {
        "sampler_order": (SamplerKind.MIN_P, SamplerKind.PENALTIES, SamplerKind.TOP_K),
        "min_p": 0.3,
        "min_keep": 60,
    },
    "k after min_p that keeps what is lifted": {
        "sampler_order": (SamplerKind.MIN_P, SamplerKind.PENALTIES, SamplerKind.TOP_K),
        "min_p": 0.99,
        "min_keep": 200,
        "top_k": 25,
        "repetition_penalty": 0.1,
        "repetition_window": 20,
    },
    "min_p": {"top_k": 0, "top_p": 1.0, "min_p": 0.05},
    "min_p after a temperature": {
        "sampler_order": (SamplerKind.PENALTIES, SamplerKind.TEMPERATURE, SamplerKind.MIN_P),
        "min_p": 0.1,
        "temperature": 2.5,
    },
    "top_p": {"top_k": 0, "top_p": 0.8},
    "top_p of nearly all": {"top_k": 0, "top_p": 0.99999},
    "top_p with min_keep": {"top_k": 0, "top_p": 0.01, "min_keep": 200},
    "top_p with min_keep over what is at hand": {"top_k": 0, "top_p": 0.01, "min_keep": 1000},
    "top_p after a temperature": {
        "sampler_order": (SamplerKind.TEMPERATURE, SamplerKind.TOP_P),
        "temperature": 1.3,
        "top_p": 0.3,
    },
    "top_p after a temperature, then the rest": {
        "sampler_order": (
            SamplerKind.TEMPERATURE,
            SamplerKind.PENALTIES,
            SamplerKind.TOP_P,
            SamplerKind.MIN_P,
            SamplerKind.TOP_K,
            SamplerKind.XTC,
        ),
        "temperature": 0.6,
        "min_p": 0.05,
        "xtc_probability": 1.0,
    },
    "top_p and a bias that takes all": {"top_k": 0, "logit_bias": ((5, 1000.0),), "top_p": 0.5},
    "top_p and penalties that lower": {"top_k": 0, "repetition_penalty": 10.0, "presence_penalty": 2.0},
    "min_p with min_keep": {"top_k": 0, "top_p": 1.0, "min_p": 0.5, "min_keep": 30},
    "penalties that lift": {"repetition_penalty": 0.5, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    "penalties that lower": {"repetition_penalty": 10.0, "presence_penalty": 2.0, "repetition_window": -1},
    "biases that lift": {"logit_bias": ((0, 500.0), (4098, 60.0), (17, 2.0), (17, 2.0))},
    "biases that lower": {"logit_bias": tuple((token, -1000.0) for token in range(1024))},
    "dry": {"dry_multiplier": 3.0, "dry_allowed_length": 1, "dry_sequence_breakers": ()},
    "xtc and typical": {"xtc_probability": 1.0, "xtc_threshold": 0.02, "typical_p": 0.9, "top_p": 1.0},
}


def lines_of(rng: np.random.Generator, shape: str) -> Logits:
    """Rows that are hard for a prefilter."""
    row = rng.normal(0, 3, N_WIDE).astype(np.float32)
    if shape == "ties":
        row = np.round(row)
    elif shape == "mostly ruled out":
        row[rng.random(N_WIDE) < 0.97] = -np.inf
    elif shape == "all but 3 ruled out":
        row[rng.permutation(N_WIDE)[3:]] = -np.inf
    elif shape == "equal":
        row[:] = 1.5
    elif shape == "ascending":
        row = np.sort(row)
    return row


@pytest.mark.model
@pytest.mark.parametrize(
    "row_shape", ["normal", "ties", "mostly ruled out", "all but 3 ruled out", "equal", "ascending"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefilter_leaves_the_candidates_of_the_whole_row(wide, shape, row_shape):
    """Equal logits at the edge of a filter may stand for each other: llama.cpp's sort is not stable."""
    params = SamplingParams(**SHAPES[shape])
    for seed in range(4):
        rng = np.random.default_rng(seed)
        row = lines_of(rng, row_shape)
        best = np.argsort(-row)[:150]
        seen = rng.permutation(np.concatenate([best, best[:9], rng.integers(0, N_WIDE, 50)]))
        results = []
        for prefilter in (True, False):
            sampler = wide(params, prefilter=prefilter)
            for token in seen.tolist():
                sampler.accept(token)
            ids, logits = sampler.candidates(row, xtc=True)
            sampler.close()
            assert len({*ids.tolist()}) == len(ids)
            results.append(dict(zip(ids.tolist(), logits.tolist(), strict=True)))
        few, whole = results
        if params.temperature == 0:
            best_logit = max(whole.values())
            expected = {token for token, logit in whole.items() if logit == best_logit}
            found = {token for token, logit in few.items() if logit == best_logit}
            assert min(found) == min(expected)
            assert max(few.values()) == best_logit
            continue
        if row_shape == "equal" and shape.startswith("top_p"):
            # llama.cpp sums thousands of equal chances in float32: it may be off by one of them.
            assert abs(len(few) - len(whole)) <= 1
            assert {*few.values()} == {*whole.values()}
            continue
        assert sorted(few.values()) == sorted(whole.values())
        if params.typical_p < 1:
            continue  # its edge may be anywhere
        edge = min(few.values())
        assert all(whole[token] == logit for token, logit in few.items() if logit > edge)


@pytest.mark.model
def test_prefilter_hands_over_few_candidates(wide):
    """Without this the test above could compare the whole row with itself."""
    row = np.random.default_rng(0).normal(0, 3, N_WIDE).astype(np.float32)
    greedy = SamplingParams(temperature=0, repetition_penalty=1.1)
    near = SamplingParams(sampler_order=(SamplerKind.MIN_P,), min_p=0.1)
    for params, most in ((greedy, 150), (near, 50)):
        sampler = wide(params, prefilter=True)
        for token in range(50):
            sampler.accept(token)
        ids, _ = sampler.candidates(row)
        sampler.close()
        assert 1 <= len(ids) <= most


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


class NativeDraw:
    """llama.cpp's own mirostat or adaptive-p, over one array of candidates."""

    def __init__(self, make: str, *arguments: object) -> None:
        from bear_grpc.backend.native import lib

        self._lib = lib
        self._sampler = getattr(lib, f"llama_sampler_init_{make}")(*arguments)

    def draw(self, logits: Logits) -> tuple[int, list[tuple[int, float]]]:
        """The token that it selects, and ids and chances of those it selected from."""
        lib, size = self._lib, len(logits)
        data = (lib.llama_token_data * size)(*((token, logit, 0.0) for token, logit in enumerate(logits)))
        array = lib.llama_token_data_array(data=data, size=size, selected=-1, sorted=False)
        lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        lib.llama_sampler_accept(self._sampler, token)
        return token, [(array.data[place].id, array.data[place].p) for place in range(array.size)]

    def close(self) -> None:
        self._lib.llama_sampler_free(self._sampler)


STEERED = {
    "mirostat": SamplingParams(mirostat=1, mirostat_tau=4.0, mirostat_eta=0.3),
    "mirostat_v2": SamplingParams(mirostat=2, mirostat_tau=4.0, mirostat_eta=0.3),
    "adaptive_p": SamplingParams(adaptive_p_target=0.3, adaptive_p_decay=0.8),
}


@pytest.mark.model
@pytest.mark.parametrize("make", STEERED)
def test_steered_draws_have_the_chances_of_llama_cpps(wide, make):
    """Ours follows the tokens that llama.cpp draws, so both have learnt the same at every step."""
    params, size = STEERED[make], 200
    arguments = {
        "mirostat": (size, 1, params.mirostat_tau, params.mirostat_eta, 100),
        "mirostat_v2": (1, params.mirostat_tau, params.mirostat_eta),
        "adaptive_p": (params.adaptive_p_target, params.adaptive_p_decay, 1),
    }
    native = NativeDraw(make, *arguments[make])
    ours = AdaptiveP(params) if make == "adaptive_p" else Mirostat(params)
    rng, ids = np.random.default_rng(0), np.arange(size, dtype=np.int32)
    for _ in range(30):
        row = rng.normal(0, 2, size).astype(np.float32)
        token, chances = native.draw(row)
        # Mirostat 1 draws in llama.cpp's order, the others in that of ids.
        order = chances if make == "mirostat" else sorted(chances)
        total, places = 0.0, {}
        for candidate, chance in order:
            places[candidate] = total + chance / 2
            total += chance
        for candidate, chance in order:
            if chance > 1e-4:
                assert ours.draw(ids, row, places[candidate] / total, size) == candidate
        assert ours.draw(ids, row, places[token] / total, size) == token
        ours.accept(token)
    native.close()
