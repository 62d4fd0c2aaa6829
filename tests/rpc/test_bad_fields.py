"""Every field with a limit, beyond it: INVALID_FIELD names it. What is not built yet is never ignored."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TypeVar

import pytest
from google.protobuf import text_format
from google.protobuf.message import Message

from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import server_service_pb2 as server_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import Api, Code, fails, stream_fails

M = TypeVar("M", bound=Message)


def parse(kind: type[M], text: str) -> M:
    return text_format.Parse(text, kind())


def within(name: str, *parts: str) -> str:
    """A message field of this name, in text format."""
    return f"{name} {{ {' '.join(parts)} }}"


def quoted(text: str) -> str:
    return f'"{text}"'


SAMPLING = {
    "temperature": ("-0.1", "100.1", "nan", "inf"),
    "top_k": ("-1",),
    "top_p": ("0", "-1", "1.1", "nan"),
    "min_p": ("-0.1", "1.1", "nan"),
    "typical_p": ("0", "1.1"),
    "repetition_penalty": ("0", "-1", "10.1", "nan"),
    "repetition_window": ("-2", "1048577"),
    "frequency_penalty": ("-2.1", "2.1", "inf"),
    "presence_penalty": ("-2.1", "2.1"),
    "seed": ("-1", "4294967296"),
    "top_n_sigma": ("-0.1", "100.1", "nan"),
    "xtc_probability": ("-0.1", "1.1"),
    "xtc_threshold": ("-0.1", "1.1"),
    "dry_multiplier": ("-0.1", "inf"),
    "dry_base": ("0.9", "100.1"),
    "dry_allowed_length": ("0", "1001"),
    "dry_window": ("-2", "1048577"),
    "dynamic_temperature_range": ("-0.1", "100.1"),
    "dynamic_temperature_exponent": ("0", "nan"),
    "mirostat": ("-1", "3"),
    "mirostat_tau": ("-0.1", "100.1"),
    "mirostat_eta": ("-0.1", "1.1"),
    "adaptive_p_target": ("-0.1", "1.1", "nan"),
    "adaptive_p_decay": ("-0.1", "1"),
    "min_keep": ("0", "1001"),
}

# What is added to a request that is good otherwise, and the field that must be named.
GENERATE = [
    *(
        (f"sampling {{ {name}: {value} }}", f"sampling.{name}")
        for name, bad in SAMPLING.items()
        for value in bad
    ),
    ("sampling { logit_bias { token_id: 5 bias: 1000.1 } }", "sampling.logit_bias[0].bias"),
    ("sampling { logit_bias {} logit_bias { bias: nan } }", "sampling.logit_bias[1].bias"),
    ("sampling { logit_bias { token_id: -1 bias: 1 } }", "sampling.logit_bias[0]"),
    ("sampling { logit_bias {} logit_bias { token_id: 999999 } }", "sampling.logit_bias[1]"),
    (within("sampling", *["logit_bias {}"] * 1025), "sampling.logit_bias"),
    ("sampling { sampler_order: SAMPLER_KIND_UNSPECIFIED }", "sampling.sampler_order[0]"),
    ("sampling { sampler_order: [SAMPLER_KIND_TOP_K, 99] }", "sampling.sampler_order[1]"),
    ("sampling { sampler_order: [SAMPLER_KIND_TOP_K, SAMPLER_KIND_TOP_K] }", "sampling.sampler_order"),
    ("sampling { sampler_order: SAMPLER_KIND_TOP_K mirostat: 1 }", "sampling.sampler_order"),
    ("sampling { mirostat: 2 adaptive_p_target: 0.5 }", "sampling.adaptive_p_target"),
    (within("sampling", *['dry_sequence_breakers: "a"'] * 17), "sampling.dry_sequence_breakers"),
    ('sampling { dry_sequence_breakers: "" }', "sampling.dry_sequence_breakers[0]"),
    (within("sampling", "dry_sequence_breakers:", quoted("x" * 65)), "sampling.dry_sequence_breakers[0]"),
    ("stop { max_tokens: -1 }", "stop.max_tokens"),
    ("stop { max_tokens: 3 min_tokens: 4 }", "stop.min_tokens"),
    ("constraint {}", "constraint"),
    ("constraint { choices {} }", "constraint.choices.values"),
    (within("constraint { choices", *['values: "a"'] * 1025, "}"), "constraint.choices.values"),
    *(
        (within("constraint", f"{kind}:", quoted("x" * (2**16 + 1))), f"constraint.{kind}")
        for kind in ("json_schema_json", "regex", "lark", "gbnf")
    ),
    *(
        (within("constraint", f"{kind}:", quoted("[" * 201 + "(" * 201)), f"constraint.{kind}")
        for kind in ("json_schema_json", "lark")
    ),
    (within("constraint", "gbnf:", quoted("(" * 201)), "constraint.gbnf"),
    ("stop { min_tokens: -1 }", "stop.min_tokens"),
    ('stop { sequences: "a" sequences: "" }', "stop.sequences[1]"),
    (within("stop", "sequences:", quoted("ä" * 129)), "stop.sequences[0]"),
    (within("stop", *['sequences: "a"'] * 17), "stop.sequences"),
    (within("stop", *["token_ids: 5"] * 65), "stop.token_ids"),
    ("stop { token_ids: 5 token_ids: -1 }", "stop.token_ids[1]"),
    ("stop { token_ids: 999999 }", "stop.token_ids[0]"),
    ("output { top_logprobs: -1 }", "output.top_logprobs"),
    ("output { top_logprobs: 21 }", "output.top_logprobs"),
    ("n: 0", "n"),
    ("n: -1", "n"),
    ("n: 17", "n"),
    ("priority: 99", "priority"),
    ("overflow_policy: -1", "overflow_policy"),
    ("overflow_policy: 99", "overflow_policy"),
    (f"client_tag: {quoted('x' * 65)}", "client_tag"),
    (f"request_id: {quoted('ä' * 65)}", "request_id"),
]

INPUT = [
    ("", "input"),
    ("token_ids {}", "token_ids.ids"),
    (f"prompt: {quoted('x' * (2**20 + 1))}", "prompt"),
    ("chat {}", "chat.messages"),
    (within("chat", *['messages { role: "user" }'] * 1025), "chat.messages"),
    ('chat { messages { content { text: "a" } } }', "chat.messages[0].role"),
    (f"chat {{ messages {{ role: {quoted('x' * 65)} }} }}", "chat.messages[0].role"),
    (
        'chat { messages { role: "user" } messages { role: "user" content {} } }',
        "chat.messages[1].content[0]",
    ),
    (
        within(
            "chat { messages",
            'role: "user" content { text: "y" }',
            within("content", "text:", quoted("x" * 2**20)),
            "}",
        ),
        "chat.messages",
    ),
]

LOAD = {
    "context_length": (0, -1, 2**24 + 1),
    "max_sequences": (0, 257),
    "gpu_layers": (-2,),
    "threads": (0, 513),
    "kv_cache_tokens": (0, 2**26 + 1),
    "batch_tokens": (31, 8193),
    "micro_batch_tokens": (31, 8193),
    "kv_cache_type": (99,),
}

DEFAULTS = {
    name: bad
    for name, bad in SAMPLING.items()
    if name in models_pb.SamplingOverrides.DESCRIPTOR.fields_by_name
}

NAMES = ["", " ", "-a", "a b", "ä", "a\n", "x" * 129]


def short(text: object) -> str:
    return str(text)[:60]


@pytest.mark.parametrize(("text", "field"), GENERATE, ids=short)
async def test_a_bad_field_of_a_generation_is_named(api: Api, tiny: str, text: str, field: str) -> None:
    request = parse(inference_pb.GenerateRequest, f'model: "{tiny}" prompt: "hello" {text}')
    seen, status = await stream_fails(api.inference.Generate(request), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert seen == []
    assert status.fields == [field]
    assert status.bad_request is not None
    assert status.bad_request.field_violations[0].description
    once = inference_pb.GenerateOnceRequest(request=request)
    status = await fails(api.inference.GenerateOnce(once), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == [f"request.{field}"]


@pytest.mark.parametrize(("text", "field"), INPUT, ids=short)
async def test_a_bad_input_is_named(api: Api, tiny: str, text: str, field: str) -> None:
    request = parse(inference_pb.GenerateRequest, f'model: "{tiny}" {text}')
    _, status = await stream_fails(api.inference.Generate(request), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == [field]


async def test_all_bad_fields_of_a_generation_are_named_at_once(api: Api) -> None:
    request = parse(
        inference_pb.GenerateRequest,
        "sampling { temperature: -1 top_p: 0 logit_bias { bias: nan } } chat {}"
        f'stop {{ max_tokens: -1 sequences: "" }} n: 0 priority: 99 client_tag: {quoted("x" * 65)}',
    )
    _, status = await stream_fails(api.inference.Generate(request), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert sorted(status.fields) == [
        "chat.messages",
        "client_tag",
        "model",
        "n",
        "priority",
        "sampling.logit_bias[0].bias",
        "sampling.temperature",
        "sampling.top_p",
        "stop.max_tokens",
        "stop.sequences[0]",
    ]


async def test_a_generate_once_without_request_is_refused(api: Api) -> None:
    call = api.inference.GenerateOnce(inference_pb.GenerateOnceRequest())
    assert (await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields == ["request"]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in LOAD.items() for value in bad])
async def test_a_bad_load_option_is_named(
    api: Api, tiny: str, tiny_file: Path, name: str, value: int
) -> None:
    options = pb.LoadOptions(**{name: value})  # type: ignore[arg-type]
    load = models_pb.LoadModelRequest(name=tiny, options=options)
    status = await fails(api.models.LoadModel(load), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == [f"options.{name}"]
    register = api.register("bad-options", tiny_file, load_options=options)
    status = await fails(register, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == [f"load_options.{name}"]


async def test_a_micro_batch_above_the_batch_is_named(api: Api, tiny: str) -> None:
    call = api.load(tiny, batch_tokens=64, micro_batch_tokens=65)
    status = await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["options.micro_batch_tokens"]


async def test_all_bad_load_options_are_named_at_once(api: Api, tiny: str) -> None:
    call = api.load(tiny, context_length=0, max_sequences=0, threads=0, kv_cache_type=99)
    status = await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert sorted(status.fields) == [
        f"options.{name}" for name in ("context_length", "kv_cache_type", "max_sequences", "threads")
    ]


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, bad in DEFAULTS.items() for v in bad] + [("max_tokens", "0")]
)
async def test_a_bad_default_is_named(api: Api, tiny_file: Path, name: str, value: str) -> None:
    defaults = parse(models_pb.SamplingOverrides, f"{name}: {value}")
    call = api.register("bad-defaults", tiny_file, defaults=defaults)
    status = await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == [f"defaults.{name}"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
async def test_a_bad_name_or_alias_is_named(api: Api, tiny_file: Path, name: str) -> None:
    status = await fails(api.register(name, tiny_file), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["name"]
    call = api.register("good", tiny_file, aliases=["fine", name])
    (field,) = (await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields
    assert field.startswith("aliases")


async def test_all_bad_fields_of_a_registration_are_named_at_once(api: Api) -> None:
    call = api.register(
        "bad name",
        "",
        aliases=["bad alias"],
        defaults=models_pb.SamplingOverrides(temperature=-1, top_p=0),
        load_options=pb.LoadOptions(threads=0),
    )
    fields = (await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields
    assert [field.partition("[")[0] for field in sorted(fields)] == [
        "aliases",
        "defaults.temperature",
        "defaults.top_p",
        "load_options.threads",
        "name",
        "path",
    ]


async def test_a_negative_page_size_is_named(api: Api) -> None:
    call = api.models.ListModels(models_pb.ListModelsRequest(page_size=-1))
    assert (await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields == ["page_size"]


@pytest.mark.parametrize(
    "content",
    [b"", b"5", b"null", b'"ab"', b"[1, []]", b'["a", [1]]', b'["a"]', b"{}", b"\xff", b"[" * 100_000],
    ids=short,
)
async def test_a_page_token_that_is_not_the_servers_is_named(api: Api, content: bytes) -> None:
    token = base64.urlsafe_b64encode(content).decode() or "!"
    call = api.models.ListModels(models_pb.ListModelsRequest(page_token=token))
    assert (await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields == ["page_token"]


async def test_a_page_token_of_another_filter_is_named(api: Api, tiny: str, demo: str) -> None:
    page = await api.models.ListModels(models_pb.ListModelsRequest(page_size=1))
    again = models_pb.ListModelsRequest(page_token=page.next_page_token, states=[pb.MODEL_STATE_READY])
    status = await fails(api.models.ListModels(again), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["page_token"]


async def test_a_negative_drain_time_is_named(api: Api, tiny: str) -> None:
    status = await fails(api.unload(tiny, -1), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["drain_timeout"]


async def test_a_missing_name_is_named_by_every_call(api: Api) -> None:
    for call, field in (
        (api.load(""), "name"),
        (api.unload(""), "name"),
        (api.delete(""), "name"),
        (api.status(""), "name"),
        (api.models.GetModel(models_pb.GetModelRequest()), "name"),
        (api.inference.Tokenize(inference_pb.TokenizeRequest(text="a")), "model"),
        (api.inference.CountTokens(inference_pb.CountTokensRequest(prompt="a")), "model"),
        (api.inference.Detokenize(inference_pb.DetokenizeRequest(token_ids=[1])), "model"),
    ):
        assert (await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields == [field]


async def test_bad_fields_of_token_calls_are_named(api: Api, tiny: str) -> None:
    for call, fields in (
        (api.inference.Tokenize(inference_pb.TokenizeRequest()), ["input", "model"]),
        (api.inference.CountTokens(inference_pb.CountTokensRequest()), ["input", "model"]),
        (
            api.inference.Detokenize(inference_pb.DetokenizeRequest(model=tiny, token_ids=[1, 99999])),
            ["token_ids[1]"],
        ),
        (
            api.inference.Tokenize(inference_pb.TokenizeRequest(model=tiny, text="x" * (2**20 + 1))),
            ["text"],
        ),
    ):
        assert sorted((await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields) == fields


async def test_long_values_and_many_violations_still_arrive_as_a_status(
    api: Api, tiny: str, tiny_file: Path
) -> None:
    """What a client had sent was echoed whole: above 8 KiB of metadata gRPC drops the status."""
    long = "x" * 100_000
    await fails(api.status(long), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    await fails(api.once(long), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    await fails(api.register(long, tiny_file), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    await fails(api.register("long", long), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    await fails(api.register("long", f"/{long}"), Code.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
    await fails(
        api.once(tiny, logit_bias=dict.fromkeys(range(1024), 5000.0)), Code.INVALID_ARGUMENT, "INVALID_FIELD"
    )
    await fails(api.once(tiny, stop=[""] * 16, client_tag=long), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    await fails(
        api.models.WatchModels(models_pb.WatchModelsRequest(names=[long])).read(),
        Code.NOT_FOUND,
        "MODEL_NOT_FOUND",
    )


@pytest.mark.parametrize(
    "text", ["n: 1", "priority: PRIORITY_NORMAL", "overflow_policy: OVERFLOW_POLICY_ERROR"]
)
async def test_defaults_may_be_named(api: Api, tiny: str, text: str) -> None:
    request = parse(
        inference_pb.GenerateRequest, f'model: "{tiny}" prompt: "hello" stop {{ max_tokens: 1 }} {text}'
    )
    answer = await api.inference.GenerateOnce(inference_pb.GenerateOnceRequest(request=request))
    assert answer.usage.completion_token_count == 1


@pytest.mark.parametrize("nanos", [-1, 0, 99_999_999, 60_000_000_001])
async def test_interval_of_load_readings_has_bounds(api: Api, nanos: int) -> None:
    request = server_pb.WatchLoadRequest()
    request.interval.FromNanoseconds(nanos)
    details = await fails(api.server.WatchLoad(request).read(), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details.fields == ["interval"]
