"""Limits of options and parameters: each violation is named, with its limit."""

from __future__ import annotations

import math

import msgspec
import pytest

from bear_grpc.errors import FieldViolation, InvalidField
from bear_grpc.input_limits import DEFAULT_LIMITS
from bear_grpc.params import (
    MAX_DRY_BREAKERS,
    SAMPLER_ORDER,
    SamplerKind,
    SamplingParams,
    StopParams,
)
from bear_grpc.types import KvCacheType, LoadOptions, check

LOAD_LIMITS = {
    "context_length": (1, 2**24),
    "max_sequences": (1, 256),
    "kv_cache_tokens": (1, 2**26),
    "gpu_layers": (-1, 10_000),
    "threads": (1, 512),
    "batch_tokens": (32, 8192),
    "micro_batch_tokens": (32, 8192),
}
# (lowest that is good or None if it is excluded, highest), as the contract's comments state them.
SAMPLING_LIMITS = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (None, 1),
    "min_p": (0, 1),
    "typical_p": (None, 1),
    "repetition_penalty": (None, 10),
    "repetition_window": (-1, 2**20),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "seed": (0, 2**32 - 1),
    "top_n_sigma": (0, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "dry_allowed_length": (1, 1000),
    "dry_window": (-1, 2**20),
    "dynamic_temperature_range": (0, 100),
    "dynamic_temperature_exponent": (0.01, 100),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 1),
    "adaptive_p_target": (0, 1),
    "adaptive_p_decay": (0, 0.99),
    "min_keep": (1, 1000),
}


def fields(violations: list[FieldViolation]) -> list[str]:
    return [violation.field for violation in violations]


def test_load_options_every_number_has_limits_here():
    not_numbers = {"kv_cache_type", "flash_attention", "mmap", "mlock", "repack", "kv_unified", "pinned"}
    not_numbers |= {"keep_alive_s"}  # any: a negative one is for ever
    assert {*LoadOptions.__struct_fields__} == {*LOAD_LIMITS, *not_numbers}


def test_sampling_every_number_has_limits_here():
    lists = {"logit_bias", "dry_sequence_breakers", "sampler_order"}
    assert {*SamplingParams.__struct_fields__} == {*SAMPLING_LIMITS, *lists}


@pytest.mark.parametrize(("name", "limits"), LOAD_LIMITS.items())
def test_load_options_at_the_limits_are_good(name, limits):
    for value in limits:
        assert LoadOptions(**{name: value}).violations() == []


@pytest.mark.parametrize(("name", "limits"), LOAD_LIMITS.items())
def test_load_options_past_a_limit_are_named_with_it(name, limits):
    low, high = limits
    for value in (low - 1, high + 1):
        [violation] = LoadOptions(**{name: value}).violations("x")
        assert violation == FieldViolation(f"x.{name}", f"must be {low} to {high}, is {value}")


def test_load_options_unset_have_no_violation():
    assert LoadOptions().violations() == []


def test_load_options_micro_batch_over_the_batch_is_named():
    assert fields(LoadOptions(batch_tokens=64, micro_batch_tokens=65).violations()) == [
        "options.micro_batch_tokens"
    ]


def test_load_options_several_violations_are_all_named():
    found = LoadOptions(threads=0, context_length=0).violations()
    assert {*fields(found)} == {"options.threads", "options.context_length"}


def test_load_options_over_keeps_what_is_asked_and_fills_the_rest():
    base = LoadOptions(threads=4, mmap=True, gpu_layers=3)
    asked = LoadOptions(threads=2, mmap=False, gpu_layers=0)
    assert asked.over(base) == asked
    assert LoadOptions(threads=2).over(base) == LoadOptions(threads=2, mmap=True, gpu_layers=3)


def test_load_options_differing_names_only_what_is_asked_for():
    effective = LoadOptions(threads=2, mmap=True, kv_cache_type=KvCacheType.F16)
    asked = LoadOptions(threads=2, mmap=False, kv_cache_type=KvCacheType.Q8_0)
    assert asked.differing(effective) == ["kv_cache_type", "mmap"]
    assert LoadOptions().differing(effective) == []


def test_sampling_defaults_are_good():
    assert SamplingParams().violations() == []


@pytest.mark.parametrize(("name", "limits"), SAMPLING_LIMITS.items())
def test_sampling_at_the_limits_is_good(name, limits):
    low, high = limits
    for value in (1e-9 if low is None else low, high):
        assert SamplingParams(**{name: value}).violations() == []


@pytest.mark.parametrize(("name", "limits"), SAMPLING_LIMITS.items())
def test_sampling_past_a_limit_is_named_with_it(name, limits):
    low, high = limits
    for value in (0 if low is None else low - 1, math.nextafter(high, math.inf), high + 1):
        [violation] = SamplingParams(**{name: value}).violations("x")
        assert violation.field == f"x.{name}"
        assert f"{high:g}" in violation.description or str(high) in violation.description
        assert violation.description.endswith(f"is {value}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SAMPLING_LIMITS)
def test_sampling_not_finite_is_named(name, value):
    assert fields(SamplingParams(**{name: value}).violations()) == [f"sampling.{name}"]


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf, 1000.5, -1000.5])
def test_sampling_bad_bias_is_named_with_its_place(bias):
    found = SamplingParams(logit_bias=((1, 0.0), (2, bias))).violations()
    assert fields(found) == ["sampling.logit_bias[1].bias"]


def test_sampling_bias_at_the_limits_is_good():
    assert SamplingParams(logit_bias=((1, 1000.0), (1, -1000.0))).violations() == []


def test_sampling_too_many_biases_are_named():
    assert SamplingParams(logit_bias=((1, 0.0),) * DEFAULT_LIMITS.max_logit_bias).violations() == []
    [violation] = SamplingParams(logit_bias=((1, 0.0),) * (DEFAULT_LIMITS.max_logit_bias + 1)).violations()
    assert violation == FieldViolation("sampling.logit_bias", "at most 1024 entries, has 1025")


@pytest.mark.parametrize(
    ("change", "uses"),
    [
        ({}, True),
        ({"repetition_window": 0}, False),
        ({"repetition_penalty": 1.0}, False),
        ({"repetition_penalty": 1.0, "frequency_penalty": 0.5}, True),
        ({"repetition_penalty": 1.0, "presence_penalty": 0.5}, True),
        ({"repetition_window": -1}, True),
        ({"sampler_order": tuple(kind for kind in SamplerKind if kind is not SamplerKind.PENALTIES)}, False),
    ],
)
def test_sampling_penalties_are_used_when_one_is_on_and_the_window_open(change, uses):
    assert SamplingParams(**change).uses_penalties is uses


@pytest.mark.parametrize(
    ("change", "uses"),
    [
        ({}, False),
        ({"dry_multiplier": 0.1}, True),
        ({"dry_multiplier": 0.1, "dry_window": 0}, False),
        ({"dry_multiplier": 0.1, "sampler_order": (SamplerKind.TOP_K,)}, False),
    ],
)
def test_sampling_dry_is_used_when_it_is_on_and_the_window_open(change, uses):
    assert SamplingParams(**change).uses_dry is uses


@pytest.mark.parametrize(
    ("change", "uses"),
    [
        ({}, False),
        ({"xtc_probability": 0.1}, True),
        ({"xtc_probability": 0.1, "xtc_threshold": 0.5}, True),
        ({"xtc_probability": 0.1, "xtc_threshold": 0.51}, False),
        ({"xtc_probability": 0.1, "temperature": 0.0}, False),
        ({"xtc_probability": 0.1, "mirostat": 1}, False),
        ({"xtc_probability": 0.1, "sampler_order": (SamplerKind.TOP_K,)}, False),
    ],
)
def test_sampling_xtc_is_used_when_it_can_remove_anything(change, uses):
    assert SamplingParams(**change).uses_xtc is uses


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({}, 64),
        ({"repetition_penalty": 1.0}, 0),
        ({"dry_multiplier": 1.0}, -1),
        ({"dry_multiplier": 1.0, "dry_window": 100}, 100),
        ({"dry_multiplier": 1.0, "dry_window": 10}, 64),
        ({"repetition_window": -1}, -1),
        ({"repetition_window": -1, "repetition_penalty": 1.0, "dry_multiplier": 1.0, "dry_window": 3}, 3),
    ],
)
def test_sampling_seen_window_is_the_longest_that_is_used(change, window):
    assert SamplingParams(**change).seen_window == window


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, "penalties top_k top_p temperature"),
        ({"temperature": 0.0, "dry_multiplier": 1.0}, "penalties dry"),
        ({"mirostat": 2, "dry_multiplier": 1.0, "min_p": 0.1}, "penalties dry temperature"),
        ({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}, ""),
        ({"temperature": 1.0, "dynamic_temperature_range": 0.1}, "penalties top_k top_p temperature"),
        ({"min_p": 0.1, "typical_p": 0.9}, "penalties top_k typical_p top_p min_p temperature"),
        ({"top_n_sigma": 1.0, "xtc_probability": 1.0}, "penalties top_n_sigma top_k top_p xtc temperature"),
        ({"sampler_order": (SamplerKind.TEMPERATURE, SamplerKind.TOP_K)}, "temperature top_k"),
    ],
)
def test_sampling_filters_are_those_that_are_on_in_their_order(change, names):
    assert " ".join(kind.value for kind in SamplingParams(**change).filters) == names


@pytest.mark.parametrize(
    ("text", "size"), [("", 0), ("a" * 41, 41), ("€" * 14, 42), ("a\0b", 3)], ids=["empty", "a", "€", "null"]
)
def test_sampling_bad_breaker_is_named_with_its_place(text, size):
    [violation] = SamplingParams(dry_sequence_breakers=("a", text)).violations("x")
    limit = f"must be 1 to 40 bytes without a null, is {size}"
    assert violation == FieldViolation("x.dry_sequence_breakers[1]", limit)


def test_sampling_breakers_at_the_limits_are_good():
    texts = ("a" * 40, "€" * 13 + "a", *"bcdefghijklmno")
    assert len(texts) == MAX_DRY_BREAKERS
    assert SamplingParams(dry_sequence_breakers=texts).violations() == []
    assert SamplingParams(dry_sequence_breakers=()).violations() == []


def test_sampling_too_many_breakers_are_named():
    [violation] = SamplingParams(dry_sequence_breakers=("a",) * 17).violations()
    assert violation == FieldViolation("sampling.dry_sequence_breakers", "at most 16, has 17")


def test_sampling_order_that_names_a_filter_twice_is_named():
    twice = (SamplerKind.TOP_K, SamplerKind.TOP_P, SamplerKind.TOP_K)
    [violation] = SamplingParams(sampler_order=twice).violations()
    assert violation == FieldViolation("sampling.sampler_order", "names a filter twice")


@pytest.mark.parametrize("order", [tuple(reversed(SAMPLER_ORDER)), (SamplerKind.TOP_K,), ()])
def test_sampling_order_of_single_filters_is_good(order):
    assert SamplingParams(sampler_order=order).violations() == []


def test_sampling_mirostat_with_an_order_or_adaptive_p_is_named():
    params = SamplingParams(mirostat=1, adaptive_p_target=0.5, sampler_order=(SamplerKind.TOP_K,))
    assert params.violations() == [
        FieldViolation("sampling.adaptive_p_target", "not together with mirostat"),
        FieldViolation("sampling.sampler_order", "not together with mirostat"),
    ]
    assert SamplingParams(mirostat=1, sampler_order=SAMPLER_ORDER).violations() == []


def test_stop_defaults_are_good():
    assert StopParams().violations() == []


def test_stop_max_tokens_0_is_good_and_below_is_named():
    assert StopParams(max_tokens=0).violations() == []
    [violation] = StopParams(max_tokens=-1).violations("x")
    assert violation == FieldViolation("x.max_tokens", "must be 0 or more, is -1")


def test_stop_too_many_sequences_are_named():
    assert StopParams(sequences=("a",) * DEFAULT_LIMITS.max_stop_sequences).violations() == []
    [violation] = StopParams(sequences=("a",) * (DEFAULT_LIMITS.max_stop_sequences + 1)).violations()
    assert violation == FieldViolation("stop.sequences", "at most 16, has 17")


@pytest.mark.parametrize(("text", "size"), [("", 0), ("a" * 257, 257), ("€" * 86, 258)])
def test_stop_sequence_of_a_bad_size_is_named_with_its_place(text, size):
    [violation] = StopParams(sequences=("a", text)).violations()
    assert violation == FieldViolation("stop.sequences[1]", f"must be 1 to 256 bytes, is {size}")


def test_stop_sequence_of_256_bytes_is_good():
    assert StopParams(sequences=("€" * 85 + "a",)).violations() == []


def test_stop_too_many_token_ids_are_named():
    assert StopParams(token_ids=(1,) * DEFAULT_LIMITS.max_stop_tokens).violations() == []
    [violation] = StopParams(token_ids=(1,) * (DEFAULT_LIMITS.max_stop_tokens + 1)).violations()
    assert violation == FieldViolation("stop.token_ids", "at most 64, has 65")


def test_check_names_the_violations_of_all_groups_in_order():
    groups = [[FieldViolation("a", "1")], [], [FieldViolation("b", "2"), FieldViolation("c", "3")]]
    with pytest.raises(InvalidField) as caught:
        check(*groups)
    assert fields(list(caught.value.violations)) == ["a", "b", "c"]


def test_check_without_violations_returns():
    assert check([], []) is None


def test_load_options_unknown_name_is_refused():
    with pytest.raises(msgspec.ValidationError, match="context"):
        msgspec.convert({"context": 1}, LoadOptions)
