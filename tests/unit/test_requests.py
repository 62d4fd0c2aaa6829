"""Inference requests: what is right comes through, each field that is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bear_grpc.errors import InvalidField
from bear_grpc.models.entry import ModelEntry
from bear_grpc.params import (
    ChatInput,
    ChatTurn,
    Constraint,
    ConstraintKind,
    GenerationDefaults,
    OutputParams,
    OverflowPolicy,
    Priority,
    PromptInput,
    SamplerKind,
    SamplingParams,
    StopParams,
    TokensInput,
)
from bear_grpc.rpc import requests
from bear_grpc.v1 import inference_service_pb2 as pb

Change = Callable[[pb.GenerateRequest], object]


def request(**changes: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"model": "bear", "prompt": "hello", **changes})


def chat(role: str = "user", *texts: str) -> pb.ChatInput:
    content = [pb.ContentPart(text=text) for text in texts]
    return pb.ChatInput(messages=[pb.ChatMessage(role=role, content=content)])


def bad_fields(message: pb.GenerateRequest) -> list[str]:
    with pytest.raises(InvalidField) as caught:
        requests.spec_from_proto(message)
    return [violation.field for violation in caught.value.violations]


def test_spec_of_a_plain_request_has_the_contracts_defaults():
    assert requests.spec_from_proto(request()) == requests.GenerateSpec(
        model="bear",
        input=PromptInput("hello", add_special=True, parse_special=False),
        sampling={},
        stop=StopParams(),
        n=1,
        output=OutputParams(),
        constraint=None,
        overflow=OverflowPolicy.ERROR,
        load_if_needed=True,
        request_id="",
    )


def test_spec_of_a_full_request_has_every_value():
    spec = requests.spec_from_proto(
        pb.GenerateRequest(
            model="bear",
            token_ids=pb.TokenIds(ids=[1, 2]),
            sampling=pb.SamplingParams(temperature=0, seed=0, sampler_order=[pb.SAMPLER_KIND_TOP_K]),
            stop=pb.StopParams(max_tokens=9, min_tokens=3, sequences=["x"], token_ids=[3], ignore_eos=True),
            constraint=pb.Constraint(regex="a+"),
            output=pb.OutputOptions(
                logprobs=True,
                top_logprobs=20,
                token_ids=True,
                prefill_progress=True,
                queue_progress=True,
                echo=True,
            ),
            load_if_needed=False,
            request_id="r1",
            n=16,
            priority=pb.PRIORITY_NORMAL,
            overflow_policy=pb.OVERFLOW_POLICY_TRUNCATE_MIDDLE,
        )
    )
    assert spec == requests.GenerateSpec(
        model="bear",
        input=TokensInput([1, 2]),
        sampling={"temperature": 0, "seed": 0, "sampler_order": (SamplerKind.TOP_K,)},
        stop=StopParams(max_tokens=9, sequences=("x",), token_ids=(3,), ignore_eos=True, min_tokens=3),
        n=16,
        output=OutputParams(
            tokens=True,
            logprobs=True,
            top_logprobs=20,
            echo=True,
            prefill_progress=True,
            queue_progress=True,
        ),
        constraint=Constraint(ConstraintKind.REGEX, "a+"),
        overflow=OverflowPolicy.TRUNCATE_MIDDLE,
        load_if_needed=False,
        request_id="r1",
    )


@pytest.mark.parametrize("member", OverflowPolicy)
def test_spec_overflow_policy_comes_through(member):
    number = pb.OverflowPolicy.Value(f"OVERFLOW_POLICY_{member.name}")
    assert requests.spec_from_proto(request(overflow_policy=number)).overflow is member


def test_spec_max_tokens_0_is_told_from_unset():
    zero = requests.spec_from_proto(request(stop=pb.StopParams(max_tokens=0))).stop
    unset = requests.spec_from_proto(request(stop=pb.StopParams())).stop
    assert (zero.max_tokens, unset.max_tokens) == (0, None)


def test_spec_chat_joins_the_parts_of_a_message():
    spec = requests.spec_from_proto(pb.GenerateRequest(model="bear", chat=chat("user", "a", "b")))
    assert spec.input == ChatInput([ChatTurn("user", "ab")], add_generation_prompt=True, template_kwargs={})


def test_spec_chat_options_come_through():
    message = chat("user", "a")
    message.add_generation_prompt = False
    message.template_kwargs.update({"enable_thinking": False, "n": 2, "list": ["x"]})
    spec = requests.spec_from_proto(pb.GenerateRequest(model="bear", chat=message))
    kwargs = {"enable_thinking": False, "n": 2.0, "list": ["x"]}
    assert spec.input == ChatInput([ChatTurn("user", "a")], False, kwargs)


BAD: dict[str, pb.GenerateRequest] = {
    "model": request(model=""),
    "client_tag": request(client_tag="€" * 22),
    "request_id": request(request_id="x" * 129),
    "input": pb.GenerateRequest(model="bear"),
    "prompt": request(prompt="x" * (2**20 + 1)),
    "token_ids.ids": pb.GenerateRequest(model="bear", token_ids=pb.TokenIds()),
    "chat.messages": pb.GenerateRequest(model="bear", chat=pb.ChatInput()),
    "chat.messages[0].role": pb.GenerateRequest(model="bear", chat=chat("")),
    "chat.messages[0].content[0]": pb.GenerateRequest(
        model="bear", chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content=[pb.ContentPart()])])
    ),
    "n": request(n=0),
    "stop.min_tokens": request(stop=pb.StopParams(min_tokens=-1)),
    "output.top_logprobs": request(output=pb.OutputOptions(top_logprobs=21)),
    "priority": request(priority=99),
    "overflow_policy": request(overflow_policy=99),
    "sampling.sampler_order[1]": request(sampling=pb.SamplingParams(sampler_order=[1, 0])),
    "constraint": request(constraint=pb.Constraint()),
    "constraint.regex": request(constraint=pb.Constraint(regex="x" * (2**16 + 1))),
    "stop.max_tokens": request(stop=pb.StopParams(max_tokens=-1)),
    "stop.sequences": request(stop=pb.StopParams(sequences=["x"] * 17)),
    "stop.sequences[1]": request(stop=pb.StopParams(sequences=["x", ""])),
    "stop.token_ids": request(stop=pb.StopParams(token_ids=[1] * 65)),
    "sampling.temperature": request(sampling=pb.SamplingParams(temperature=float("nan"))),
    "sampling.logit_bias[0].bias": request(
        sampling=pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=1, bias=1001)])
    ),
}


@pytest.mark.parametrize("field", BAD)
def test_spec_bad_field_is_named(field):
    assert bad_fields(BAD[field]) == [field]


def test_spec_every_bad_field_is_named_at_once():
    message = pb.GenerateRequest(
        sampling=pb.SamplingParams(top_p=0),
        stop=pb.StopParams(max_tokens=-1),
        constraint=pb.Constraint(),
        output=pb.OutputOptions(top_logprobs=-1),
        overflow_policy=99,
        request_id="x" * 129,
        n=17,
    )
    expected = {"model", "input", "sampling.top_p", "stop.max_tokens", "request_id", "n"}
    expected |= {"constraint", "output.top_logprobs", "overflow_policy"}
    assert {*bad_fields(message)} == expected


@pytest.mark.parametrize("role", ["<|end|>", "user|>", "a b", "x" * 65, "us\ner"])
def test_spec_role_that_could_form_a_control_token_is_named(role):
    message = pb.GenerateRequest(model="bear", chat=chat(role, "a"))
    assert bad_fields(message) == ["chat.messages[0].role"]


@pytest.mark.parametrize("role", ["user", "tool-call", "a.b_2", "x" * 64])
def test_spec_role_of_plain_letters_comes_through(role):
    spec = requests.spec_from_proto(pb.GenerateRequest(model="bear", chat=chat(role, "a")))
    assert spec.input.messages[0].role == role


def test_spec_chat_over_the_limit_in_sum_is_named():
    message = pb.ChatInput(messages=[*chat("user", "x" * 2**19).messages] * 3)
    assert bad_fields(pb.GenerateRequest(model="bear", chat=message)) == ["chat.messages"]


def test_spec_prompt_at_the_limit_comes_through():
    prompt = "four" * 2**16 + " six" * (2**20 // 4 - 2**16)
    assert len(prompt) == 2**20
    assert requests.spec_from_proto(request(prompt=prompt)).input == PromptInput(prompt)


def test_spec_min_tokens_above_max_tokens_are_named():
    assert bad_fields(request(stop=pb.StopParams(max_tokens=3, min_tokens=4))) == ["stop.min_tokens"]


@pytest.mark.parametrize(
    ("number", "priority"),
    [
        (pb.PRIORITY_UNSPECIFIED, Priority.NORMAL),
        (pb.PRIORITY_NORMAL, Priority.NORMAL),
        (pb.PRIORITY_LOW, Priority.LOW),
        (pb.PRIORITY_HIGH, Priority.HIGH),
    ],
)
def test_spec_priority_is_the_one_of_that_name(number, priority):
    assert requests.spec_from_proto(request(priority=number)).priority is priority


def test_spec_tag_is_the_client_tag():
    assert requests.spec_from_proto(request(client_tag="nightly")).tag == "nightly"


@pytest.mark.parametrize("seconds", [None, 0, -1, 300])
def test_spec_keep_alive_is_in_seconds(seconds):
    message = request()
    if seconds is not None:
        message.keep_alive.FromSeconds(seconds)
    assert requests.spec_from_proto(message).keep_alive_s == seconds


def test_tokenize_input_says_how_special_tokens_are_meant():
    default = requests.input_from_proto(pb.TokenizeRequest(text="a"))
    other = requests.input_from_proto(pb.TokenizeRequest(text="a", add_special=False, parse_special=True))
    assert default == PromptInput("a", add_special=True, parse_special=False)
    assert other == PromptInput("a", add_special=False, parse_special=True)


@pytest.mark.parametrize("message", [pb.TokenizeRequest(), pb.CountTokensRequest()])
def test_input_missing_is_named(message):
    with pytest.raises(InvalidField) as caught:
        requests.input_from_proto(message)
    assert [violation.field for violation in caught.value.violations] == ["input"]


def test_complete_puts_request_over_model_over_server():
    spec = requests.spec_from_proto(request(sampling=pb.SamplingParams(top_k=0)))
    defaults = GenerationDefaults(top_k=5, temperature=0.3, max_tokens=9)
    sampling, stop = spec.complete(ModelEntry("bear", Path("b"), True, defaults=defaults), seed=77)
    assert sampling == SamplingParams(top_k=0, temperature=0.3, seed=77)
    assert stop.default_max_tokens == 9


def test_complete_keeps_the_requests_seed():
    spec = requests.spec_from_proto(request(sampling=pb.SamplingParams(seed=0)))
    sampling, _ = spec.complete(ModelEntry("bear", Path("b"), True), seed=77)
    assert sampling.seed == 0
