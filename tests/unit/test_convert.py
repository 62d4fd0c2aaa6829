"""Converters between protobuf and domain: each pair undoes itself, and unset stays unset."""

from __future__ import annotations

import datetime
import enum
import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc import params, types
from bear_grpc.errors import InvalidField
from bear_grpc.models.entry import ModelEntry, ModelStatus
from bear_grpc.models.gguf import ArraySummary, GgufHeader
from bear_grpc.params import (
    ConstraintKind,
    GenerationDefaults,
    OverflowPolicy,
    Priority,
    SamplerKind,
    SamplingParams,
)
from bear_grpc.rpc import convert, inspection
from bear_grpc.types import (
    CostTable,
    EngineStats,
    FinishReason,
    KvCacheType,
    LoadOptions,
    LoadStage,
    ModelState,
    PullStage,
    SandboxMode,
    SandboxState,
    StateReason,
    StepCost,
)
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import model_service_pb2 as model_pb
from bear_grpc.v1 import types_pb2 as pb

SAMPLING = {
    "temperature": st.floats(0, 100),
    "top_k": st.integers(0, 2**31 - 1),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0, 1, exclude_min=True),
    "repetition_penalty": st.floats(0, 10, exclude_min=True),
    "repetition_window": st.integers(-1, 2**20),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "seed": st.integers(0, 2**32 - 1),
    "logit_bias": st.lists(st.tuples(st.integers(0, 99), st.floats(-1000, 1000)), max_size=3).map(tuple),
    "top_n_sigma": st.floats(0, 100),
    "xtc_probability": st.floats(0, 1),
    "xtc_threshold": st.floats(0, 1),
    "dry_multiplier": st.floats(0, 100),
    "dry_base": st.floats(1, 100),
    "dry_allowed_length": st.integers(1, 1000),
    "dry_window": st.integers(-1, 2**20),
    "dry_sequence_breakers": st.lists(st.text("a€\n", min_size=1, max_size=3), min_size=1, max_size=16).map(
        tuple
    ),
    "dynamic_temperature_range": st.floats(0, 100),
    "dynamic_temperature_exponent": st.floats(0.01, 100),
    "mirostat": st.just(0),  # not together with some others
    "mirostat_tau": st.floats(0, 100),
    "mirostat_eta": st.floats(0, 1),
    "adaptive_p_target": st.none() | st.floats(0, 1),
    "adaptive_p_decay": st.floats(0, 0.99),
    "min_keep": st.integers(1, 1000),
    "sampler_order": st.lists(st.sampled_from(SamplerKind), unique=True, min_size=1).map(tuple),
}
LOAD = {
    "context_length": st.integers(1, 2**24),
    "max_sequences": st.integers(1, 256),
    "gpu_layers": st.integers(-1, 10_000),
    "threads": st.integers(1, 512),
    "batch_tokens": st.integers(256, 8192),
    "micro_batch_tokens": st.integers(32, 256),
    "kv_cache_type": st.sampled_from(KvCacheType),
    "flash_attention": st.booleans(),
    "mmap": st.booleans(),
    "mlock": st.booleans(),
    "repack": st.booleans(),
    "kv_cache_tokens": st.integers(1, 2**26),
    "kv_unified": st.booleans(),
    "keep_alive_s": st.integers(-10, 10**6).map(float),
    "pinned": st.booleans(),
}
DEFAULTS = {name: SAMPLING[name] for name in GenerationDefaults.__struct_fields__ if name != "max_tokens"}

# Domain values of every pair of converters, by their common name; a new pair needs a line here.
PAIRS = {
    "sampling": st.builds(SamplingParams, **SAMPLING),
    "load_options": st.builds(LoadOptions, **{name: st.none() | of for name, of in LOAD.items()}),
    "defaults": st.builds(
        GenerationDefaults,
        max_tokens=st.none() | st.integers(1, 2**31 - 1),
        **{name: st.none() | of for name, of in DEFAULTS.items()},
    ),
}
ENUMS = {
    KvCacheType: (pb.KvCacheType, "KV_CACHE_TYPE"),
    ModelState: (pb.ModelState, "MODEL_STATE"),
    StateReason: (pb.ModelStateReason, "MODEL_STATE_REASON"),
    LoadStage: (pb.LoadStage, "LOAD_STAGE"),
    PullStage: (pb.PullStage, "PULL_STAGE"),
    FinishReason: (inference_pb.FinishReason, "FINISH_REASON"),
    SamplerKind: (inference_pb.SamplerKind, "SAMPLER_KIND"),
    OverflowPolicy: (inference_pb.OverflowPolicy, "OVERFLOW_POLICY"),
    Priority: (inference_pb.Priority, "PRIORITY"),
}
# Not an enum of the contract: the names of a oneof, a setting, and what one servicer translates.
NAMES_OF_FIELDS = {ConstraintKind, SandboxMode, SandboxState}
MEMBERS = [pytest.param(kind, member, id=str(member)) for kind in ENUMS for member in kind]


def pairs_by_reflection() -> set[str]:
    """Names x with both x_from_proto and x_to_proto, the generic enum converter left out."""
    names = [name for name, _ in inspect.getmembers(convert, inspect.isfunction)]
    found = {name.removesuffix("_to_proto") for name in names if name.endswith("_to_proto")}
    return {name for name in found if f"{name}_from_proto" in names} - {"enum"}


def status(**changes: object) -> ModelStatus:
    since = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    return ModelStatus("bear", ModelState.READY, None, "", since, **changes)


def test_pairs_every_one_in_the_module_is_tried_here():
    assert pairs_by_reflection() == {*PAIRS}


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data())
def test_pair_to_proto_over_the_wire_and_back_gives_an_equal_value(name, data):
    value = data.draw(PAIRS[name])
    message = getattr(convert, f"{name}_to_proto")(value)
    arrived = type(message).FromString(message.SerializeToString())
    assert getattr(convert, f"{name}_from_proto")(arrived) == value


def test_strategies_cover_every_field():
    assert {*SAMPLING} == {*SamplingParams.__struct_fields__}
    assert {*LOAD} == {*LoadOptions.__struct_fields__}


def test_overrides_unset_message_gives_nothing():
    assert convert.overrides_from_proto(inference_pb.SamplingParams()) == {}


ZEROS = {
    *("temperature", "top_k", "min_p", "repetition_window", "frequency_penalty", "presence_penalty", "seed"),
    *("top_n_sigma", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_window", "mirostat"),
    *("dynamic_temperature_range", "mirostat_tau", "mirostat_eta", "adaptive_p_target", "adaptive_p_decay"),
}


@pytest.mark.parametrize("name", sorted(ZEROS))
def test_overrides_set_to_0_are_told_from_unset(name):
    message = inference_pb.SamplingParams(**{name: 0})
    assert convert.overrides_from_proto(message) == {name: 0}


@pytest.mark.parametrize("name", ["gpu_layers", "flash_attention", "mmap", "mlock", "repack", "kv_unified"])
def test_load_options_set_to_0_are_told_from_unset(name):
    value = LoadOptions.__annotations__[name].startswith("bool")
    zero = False if value else 0
    assert convert.load_options_from_proto(pb.LoadOptions(**{name: zero})) == LoadOptions(**{name: zero})


@pytest.mark.parametrize("name", ["temperature", "top_k", "min_p", "repetition_window"])
def test_defaults_set_to_0_are_told_from_unset(name):
    message = model_pb.SamplingOverrides(**{name: 0})
    assert convert.defaults_from_proto(message) == GenerationDefaults(**{name: 0})


def test_overrides_bad_values_are_all_named():
    message = inference_pb.SamplingParams(temperature=-1, top_p=0, seed=2**32)
    with pytest.raises(InvalidField) as caught:
        convert.overrides_from_proto(message)
    names = {violation.field for violation in caught.value.violations}
    assert names == {"sampling.temperature", "sampling.top_p", "sampling.seed"}


def test_overrides_lists_that_are_empty_are_unset():
    message = inference_pb.SamplingParams(sampler_order=[], dry_sequence_breakers=[], logit_bias=[])
    assert convert.overrides_from_proto(message) == {}


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (inference_pb.SamplingParams(sampler_order=[4, 0, 99]), ["sampler_order[1]", "sampler_order[2]"]),
        (inference_pb.SamplingParams(sampler_order=[4, 4]), ["sampler_order"]),
        (inference_pb.SamplingParams(sampler_order=[4], mirostat=2), ["sampler_order"]),
        (inference_pb.SamplingParams(adaptive_p_target=0, mirostat=1), ["adaptive_p_target"]),
        (inference_pb.SamplingParams(dry_sequence_breakers=["a", ""]), ["dry_sequence_breakers[1]"]),
        (inference_pb.SamplingParams(sampler_order=[0], top_p=0), ["sampler_order[0]", "top_p"]),
    ],
    ids=str,
)
def test_overrides_bad_lists_and_what_excludes_another_are_named(message, fields):
    with pytest.raises(InvalidField) as caught:
        convert.overrides_from_proto(message)
    assert [violation.field for violation in caught.value.violations] == [f"sampling.{f}" for f in fields]


def test_load_options_bad_values_are_all_named_with_the_prefix():
    with pytest.raises(InvalidField) as caught:
        convert.load_options_from_proto(pb.LoadOptions(threads=0, batch_tokens=1), "load_options")
    names = {violation.field for violation in caught.value.violations}
    assert names == {"load_options.threads", "load_options.batch_tokens"}


def test_load_options_number_without_a_name_is_named():
    with pytest.raises(InvalidField) as caught:
        convert.load_options_from_proto(pb.LoadOptions(kv_cache_type=99))
    assert [violation.field for violation in caught.value.violations] == ["options.kv_cache_type"]


def test_load_options_kv_cache_type_unspecified_is_unset():
    message = pb.LoadOptions(kv_cache_type=pb.KV_CACHE_TYPE_UNSPECIFIED)
    assert convert.load_options_from_proto(message) == LoadOptions()


@pytest.mark.parametrize("value", [0, -1])
def test_defaults_max_tokens_below_1_is_named(value):
    with pytest.raises(InvalidField) as caught:
        convert.defaults_from_proto(model_pb.SamplingOverrides(max_tokens=value, top_p=2))
    names = {violation.field for violation in caught.value.violations}
    assert names == {"defaults.max_tokens", "defaults.top_p"}


def test_enums_every_one_of_the_domain_is_tried_here():
    assert {*ENUMS, *NAMES_OF_FIELDS} == {
        kind
        for module in (types, params)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and kind.__module__ == module.__name__
    }


@pytest.mark.parametrize(("kind", "member"), MEMBERS)
def test_enum_member_there_and_back_is_itself(kind, member):
    wrapper, prefix = ENUMS[kind]
    number = convert.enum_to_proto(member, wrapper, prefix)
    assert number > 0
    assert convert.enum_from_proto(number, wrapper, prefix, kind, "field") is member


def test_enum_none_becomes_unspecified():
    assert convert.enum_to_proto(None, pb.ModelStateReason, "MODEL_STATE_REASON") == 0


@pytest.mark.parametrize("number", [0, 9999, -1])
def test_enum_number_without_a_member_is_named(number):
    with pytest.raises(InvalidField, match="field"):
        convert.enum_from_proto(number, pb.KvCacheType, "KV_CACHE_TYPE", KvCacheType, "field")


def test_status_of_an_unloaded_model_leaves_out_what_a_loaded_one_has():
    message = convert.status_to_proto(status())
    for name in ("memory", "counters", "effective_options", "load_progress"):
        assert not message.HasField(name)


def test_status_of_a_loaded_model_has_its_counts():
    stats = EngineStats(
        steps=1, prefill_tokens=2, decode_tokens=3, submitted=4, finished=5, cancelled=6, failed=7, running=8,
        waiting=9, kv_used_tokens=10, kv_idle_tokens=3, cached_tokens=14, preemptions=15, forward_s=1.5,
        sampling_s=2.5, overhead_s=3.5,
    )  # fmt: skip
    options = LoadOptions(kv_cache_tokens=64)
    sizes = {"weights_bytes": 11, "kv_cache_bytes": 12, "compute_bytes": 16, "process_bytes": 50}
    message = convert.status_to_proto(status(stats=stats, options=options, in_flight=20, **sizes))
    assert message.counters == pb.EngineCounters(
        step_count=1,
        prefill_token_count=2,
        decode_token_count=3,
        submitted_sequence_count=4,
        finished_sequence_count=5,
        cancelled_sequence_count=6,
        failed_sequence_count=7,
        cached_token_count=14,
        preemption_count=15,
        forward_seconds=1.5,
        sampling_seconds=2.5,
        overhead_seconds=3.5,
    )
    assert message.memory == pb.MemoryLedger(overhead_bytes=11, **sizes)
    assert (message.running_count, message.waiting_count) == (8, 12)
    assert (message.kv_cache_used_token_count, message.kv_cache_token_count) == (10, 64)
    assert message.kv_cache_idle_token_count == 3


def test_status_waiting_count_is_never_negative():
    """Stats come with a frame and the requests are counted here: they may differ for a moment."""
    assert convert.status_to_proto(status(stats=EngineStats(running=3), in_flight=1)).waiting_count == 0


def test_status_times_are_kept():
    assert convert.status_to_proto(status()).since_time.ToJsonString() == "2026-01-02T03:04:05Z"


def test_model_without_header_has_no_capability_told():
    message = convert.model_to_proto(ModelEntry("bear", Path("bear.gguf"), True))
    assert list(message.capabilities) == []
    assert message.source.WhichOneof("kind") == "embedded"


def test_model_defaults_are_the_servers_with_the_models_over_them():
    entry = ModelEntry("bear", Path("bear.gguf"), False, defaults=GenerationDefaults(top_k=0, max_tokens=7))
    message = convert.model_to_proto(entry)
    assert (message.defaults.top_k, message.defaults.max_tokens) == (0, 7)
    assert message.defaults.temperature == SamplingParams().temperature
    assert message.source.file.path == "bear.gguf"


def test_model_tells_what_has_been_measured():
    entry = ModelEntry("bear", Path("bear.gguf"), True)
    entry.cost_tables = [CostTable(True, 2, [StepCost(1, 0.5), StepCost(16, 0.75)])]
    costs = [pb.StepCost(token_count=1, seconds=0.5), pb.StepCost(token_count=16, seconds=0.75)]
    assert list(convert.model_to_proto(entry).cost_tables) == [
        pb.CostTable(repack=True, threads=2, costs=costs)
    ]


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (True, {"bool_value": True}),
        (7, {"int_value": 7}),
        (2**64 - 1, {"int_value": 2**63 - 1}),
        (0.5, {"double_value": 0.5}),
        ("x", {"string_value": "x"}),
        (("a", "b"), {"array_value": {"element_type": "string", "element_count": 2}}),
        (ArraySummary("u32", 99), {"array_value": {"element_type": "u32", "element_count": 99}}),
    ],
    ids=repr,
)
def test_metadata_value_becomes_the_entry_of_its_kind(value, entry):
    header = GgufHeader(3, {"k": value}, (), 0, 32, 0)
    assert inspection.metadata_to_proto(header) == [model_pb.MetadataEntry(key="k", **entry)]
