"""Limits of options and parameters: each violation is named, with its limit."""

from __future__ import annotations

import math

import msgspec
import pytest

from bear_grpc.errors import FieldViolation, InvalidField
from bear_grpc.types import (
    MAX_LOGIT_BIAS,
    MAX_STOP_SEQUENCES,
    MAX_STOP_TOKENS,
    KvCacheType,
    LoadOptions,
    SamplingParams,
    StopParams,
    check,
)

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
}


def fields(violations: list[FieldViolation]) -> list[str]:
    return [violation.field for violation in violations]


def test_load_options_every_number_has_limits_here():
    not_numbers = {"kv_cache_type", "flash_attention", "mmap", "mlock", "repack"}
    assert {*LoadOptions.__struct_fields__} == {*LOAD_LIMITS, *not_numbers}


def test_sampling_every_number_has_limits_here():
    assert {*SamplingParams.__struct_fields__} == {*SAMPLING_LIMITS, "logit_bias"}


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
    assert SamplingParams(logit_bias=((1, 0.0),) * MAX_LOGIT_BIAS).violations() == []
    [violation] = SamplingParams(logit_bias=((1, 0.0),) * (MAX_LOGIT_BIAS + 1)).violations()
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
    ],
)
def test_sampling_penalties_are_used_when_one_is_on_and_the_window_open(change, uses):
    assert SamplingParams(**change).uses_penalties is uses


def test_stop_defaults_are_good():
    assert StopParams().violations() == []


def test_stop_max_tokens_0_is_good_and_below_is_named():
    assert StopParams(max_tokens=0).violations() == []
    [violation] = StopParams(max_tokens=-1).violations("x")
    assert violation == FieldViolation("x.max_tokens", "must be 0 or more, is -1")


def test_stop_too_many_sequences_are_named():
    assert StopParams(sequences=("a",) * MAX_STOP_SEQUENCES).violations() == []
    [violation] = StopParams(sequences=("a",) * (MAX_STOP_SEQUENCES + 1)).violations()
    assert violation == FieldViolation("stop.sequences", "at most 16, has 17")


@pytest.mark.parametrize(("text", "size"), [("", 0), ("a" * 257, 257), ("€" * 86, 258)])
def test_stop_sequence_of_a_bad_size_is_named_with_its_place(text, size):
    [violation] = StopParams(sequences=("a", text)).violations()
    assert violation == FieldViolation("stop.sequences[1]", f"must be 1 to 256 bytes, is {size}")


def test_stop_sequence_of_256_bytes_is_good():
    assert StopParams(sequences=("€" * 85 + "a",)).violations() == []


def test_stop_too_many_token_ids_are_named():
    assert StopParams(token_ids=(1,) * MAX_STOP_TOKENS).violations() == []
    [violation] = StopParams(token_ids=(1,) * (MAX_STOP_TOKENS + 1)).violations()
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
