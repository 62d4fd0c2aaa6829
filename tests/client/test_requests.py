"""Keyword arguments to messages: unset and 0 differ, and every field of the contract can be given."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, get_type_hints

import pytest
from google.protobuf.message import Message

from bear_grpc.client import options, requests
from bear_grpc.errors import InvalidField
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import types_pb2 as types


def generate(**given: Any) -> inference.GenerateRequest:
    return requests.generate("m", given.pop("prompt", "p"), given)  # type: ignore[arg-type]


def field_names(message: type[Message]) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}


def test_generate_with_nothing_given_sets_only_model_and_prompt() -> None:
    assert generate() == inference.GenerateRequest(model="m", prompt="p")


def test_none_is_unset() -> None:
    assert generate(temperature=None, seed=None, n=None, keep_alive=None) == generate()


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("temperature", "sampling.temperature"),
        ("top_k", "sampling.top_k"),
        ("seed", "sampling.seed"),
        ("max_tokens", "stop.max_tokens"),
        ("n", "n"),
    ],
)
def test_zero_is_set(option: str, path: str) -> None:
    *parents, field = path.split(".")
    message: Any = generate(**{option: 0})
    for parent in parents:
        assert message.HasField(parent)
        message = getattr(message, parent)
    assert message.HasField(field)
    assert getattr(message, field) == 0


def test_load_if_needed_false_is_set() -> None:
    request = generate(load_if_needed=False)
    assert request.HasField("load_if_needed")
    assert not request.load_if_needed


def test_options_land_in_their_messages() -> None:
    request = generate(
        temperature=0.5,
        logit_bias={5: -1.5},
        stop=["\n", "END"],
        stop_token_ids=[2],
        ignore_eos=True,
        return_token_ids=True,
        top_logprobs=3,
        choices=["yes", "no"],
        priority="high",
        overflow_policy="truncate_left",
        keep_alive=-1,
        client_tag="tag",
        request_id="id",
    )
    assert request.sampling.temperature == 0.5
    assert [(b.token_id, b.bias) for b in request.sampling.logit_bias] == [(5, -1.5)]
    assert list(request.stop.sequences) == ["\n", "END"]
    assert list(request.stop.token_ids) == [2]
    assert request.stop.ignore_eos
    assert request.output.token_ids
    assert request.output.top_logprobs == 3
    assert list(request.constraint.choices.values) == ["yes", "no"]
    assert request.priority == inference.PRIORITY_HIGH
    assert request.overflow_policy == inference.OVERFLOW_POLICY_TRUNCATE_LEFT
    assert request.keep_alive.ToTimedelta() == timedelta(seconds=-1)
    assert (request.client_tag, request.request_id) == ("tag", "id")


def test_json_schema_may_be_a_mapping() -> None:
    request = generate(json_schema={"type": "object"})
    assert request.constraint.json_schema_json == '{"type": "object"}'


def test_messages_become_chat_input() -> None:
    request = generate(
        prompt=None,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": ["Hel", "lo"]},
            inference.ChatMessage(role="assistant", content=[inference.ContentPart(text="Hi")]),
        ],
        add_generation_prompt=False,
        template_kwargs={"enable_thinking": False},
    )
    said = [(m.role, [part.text for part in m.content]) for m in request.chat.messages]
    assert said == [("system", ["Be brief."]), ("user", ["Hel", "lo"]), ("assistant", ["Hi"])]
    assert request.chat.HasField("add_generation_prompt")
    assert request.chat.template_kwargs["enable_thinking"] is False


def test_empty_token_ids_are_an_input() -> None:
    assert generate(prompt=None, token_ids=[]).WhichOneof("input") == "token_ids"


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": None},
        {"messages": []},
        {"token_ids": [1]},
        {"regex": "a", "gbnf": "b"},
        {"top_k": 2**31},
        {"sampler_order": ["top_q"]},
        {"priority": "urgent"},
        {"keep_alive": float("inf")},
    ],
    ids=str,
)
def test_what_does_not_fit_the_message_is_invalid(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidField):
        generate(**given)


def test_sampling_lists_land_as_they_are() -> None:
    sampling = generate(
        sampler_order=["top_k", "xtc"], dry_sequence_breakers=["\n", "ab"], mirostat=0
    ).sampling
    assert list(sampling.sampler_order) == [inference.SAMPLER_KIND_TOP_K, inference.SAMPLER_KIND_XTC]
    assert list(sampling.dry_sequence_breakers) == ["\n", "ab"]
    assert sampling.HasField("mirostat")


def test_output_options_land_in_output() -> None:
    request = generate(logprobs=True, echo=True, prefill_progress=True, min_tokens=2)
    assert request.output == inference.OutputOptions(logprobs=True, echo=True, prefill_progress=True)
    assert request.stop.min_tokens == 2


def test_a_stream_of_text_is_of_one_answer() -> None:
    with pytest.raises(InvalidField, match="n:"):
        requests.one_text("m", "p", {"n": 2})
    assert requests.one_text("m", "p", {"n": 1}).n == 1
    assert not requests.one_text("m", "p", {}).HasField("n")


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'temprature'"):
        generate(temprature=1)


def test_every_field_of_generate_has_an_option() -> None:
    known = set(get_type_hints(options.GenerateOptions))
    reached = (
        field_names(inference.SamplingParams)
        | {requests._STOP.get(name, name) for name in field_names(inference.StopParams)}
        | {requests._OUTPUT.get(name, name) for name in field_names(inference.OutputOptions)}
        | {name.removesuffix("_json") for name in field_names(inference.Constraint)}
        | (field_names(inference.ChatInput))
        | (field_names(inference.GenerateRequest))
    )
    not_options = {"model", "prompt", "chat", "sampling", "stop", "constraint", "output"} - {"stop"}
    assert known == reached - not_options


def test_every_field_of_load_options_has_an_option() -> None:
    assert set(get_type_hints(options.LoadOptions)) == field_names(types.LoadOptions)


def test_every_default_of_a_model_has_an_option() -> None:
    assert set(get_type_hints(options.DefaultsOptions)) == field_names(models.SamplingOverrides)


def test_load_options_keep_zero_and_false() -> None:
    message = requests.load_options(
        {"gpu_layers": 0, "mmap": False, "kv_cache_type": "q8_0", "keep_alive": 0}
    )
    assert {field.name for field, _ in message.ListFields()} == {
        "gpu_layers",
        "mmap",
        "kv_cache_type",
        "keep_alive",
    }
    assert message.kv_cache_type == types.KV_CACHE_TYPE_Q8_0


def test_register_model_takes_defaults_and_load_options() -> None:
    request = requests.register_model("n", "/p", ["a"], {"temperature": 0}, {"context_length": 512})
    assert request.defaults.HasField("temperature")
    assert request.load_options.context_length == 512
    assert list(request.aliases) == ["a"]


def test_unload_model_without_time_leaves_it_unset() -> None:
    assert not requests.unload_model("m", None).HasField("drain_timeout")
    assert requests.unload_model("m", 0).HasField("drain_timeout")
