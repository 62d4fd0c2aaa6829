"""Every limit on input is a setting, and refuses at one above it by the field's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bear_grpc.config import ConfigError, load_config
from bear_grpc.errors import InvalidField
from bear_grpc.framing import MAX_FRAME_BYTES
from bear_grpc.input_limits import DEFAULT_LIMITS, InputLimits
from bear_grpc.params import PromptInput, SamplingParams, StopParams, TokensInput
from bear_grpc.protocol import Submit
from bear_grpc.rpc.requests import input_from_proto, spec_from_proto
from bear_grpc.v1 import inference_service_pb2 as pb

DOC = (Path(__file__).parents[2] / "docs" / "limits.md").read_text(encoding="utf-8")


def chat(*texts: str) -> pb.ChatInput:
    messages = [pb.ChatMessage(role="user", content=[pb.ContentPart(text=text)]) for text in texts]
    return pb.ChatInput(messages=messages)


def bias(count: int) -> pb.SamplingParams:
    return pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=i, bias=1) for i in range(count)])


# By limit, set to 4: a field, and values of which the first is just within it and the second above.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "max_text_bytes": ("prompt", {"prompt": "a bc"}, {"prompt": "a bcd"}),
    "max_unbroken_bytes": ("prompt", {"prompt": "abcd efgh"}, {"prompt": "a bcdef"}),
    "max_messages": ("chat.messages", {"chat": chat(*"abcd")}, {"chat": chat(*"abcde")}),
    "max_token_ids": (
        "token_ids.ids",
        {"token_ids": pb.TokenIds(ids=range(4))},
        {"token_ids": pb.TokenIds(ids=range(5))},
    ),
    "max_answers": ("n", {"n": 4}, {"n": 5}),
    "max_stop_sequences": (
        "stop.sequences",
        {"stop": pb.StopParams(sequences="abcd")},
        {"stop": pb.StopParams(sequences="abcde")},
    ),
    "max_stop_sequence_bytes": (
        "stop.sequences[0]",
        {"stop": pb.StopParams(sequences=["abcd"])},
        {"stop": pb.StopParams(sequences=["abcde"])},
    ),
    "max_stop_tokens": (
        "stop.token_ids",
        {"stop": pb.StopParams(token_ids=range(4))},
        {"stop": pb.StopParams(token_ids=range(5))},
    ),
    "max_logit_bias": ("sampling.logit_bias", {"sampling": bias(4)}, {"sampling": bias(5)}),
    "max_top_logprobs": (
        "output.top_logprobs",
        {"output": pb.OutputOptions(top_logprobs=4)},
        {"output": pb.OutputOptions(top_logprobs=5)},
    ),
    "max_constraint_bytes": (
        "constraint.regex",
        {"constraint": pb.Constraint(regex="abcd")},
        {"constraint": pb.Constraint(regex="abcde")},
    ),
    "max_constraint_depth": (
        "constraint.json_schema_json",
        {"constraint": pb.Constraint(json_schema_json="[[[[]]]]")},
        {"constraint": pb.Constraint(json_schema_json="[[[[[]]]]]")},
    ),
    "max_choices": (
        "constraint.choices.values",
        {"constraint": pb.Constraint(choices=pb.Choices(values="abcd"))},
        {"constraint": pb.Constraint(choices=pb.Choices(values="abcde"))},
    ),
}
# gRPC's own, and the worker's: held by tests/rpc/test_input_limits.py and those of the text thread.
ELSEWHERE = {"max_message_bytes", "max_metadata_bytes", "max_text_job_s", "max_rendered_chars"}


def request(**fields: Any) -> pb.GenerateRequest:
    given = fields.keys() & {"prompt", "chat", "token_ids"}
    return pb.GenerateRequest(model="m", **({} if given else {"prompt": "a"}), **fields)


def test_every_limit_is_tried() -> None:
    assert {*CASES} | ELSEWHERE == {*InputLimits.__struct_fields__}


@pytest.mark.parametrize("name", CASES)
def test_a_limit_refuses_by_name_at_one_above_it(name: str) -> None:
    limits = msgspec.structs.replace(DEFAULT_LIMITS, **{name: 4})
    field, within, above = CASES[name]
    spec_from_proto(request(**within), limits)
    with pytest.raises(InvalidField) as caught:
        spec_from_proto(request(**above), limits)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert "4" in caught.value.violations[0].description
    # By default there is more room.
    spec_from_proto(request(**above))


def test_texts_to_tokenize_have_the_same_limits() -> None:
    limits = InputLimits(max_unbroken_bytes=4)
    with pytest.raises(InvalidField, match="text"):
        input_from_proto(pb.TokenizeRequest(model="m", text="abcde"), limits)
    with pytest.raises(InvalidField, match=r"chat\.messages"):
        input_from_proto(pb.TokenizeRequest(model="m", chat=chat("a", "bcdef")), limits)


@pytest.mark.parametrize("name", InputLimits.__struct_fields__)
def test_a_limit_is_a_setting_of_the_file_and_of_the_environment(name: str, tmp_path: Path) -> None:
    low = {"max_message_bytes": 2048, "max_metadata_bytes": 2048}.get(name, 3)
    file = tmp_path / "bear.toml"
    file.write_text(f"[limits]\n{name} = {low}\n")
    assert getattr(load_config(file, environ={}).limits, name) == low
    variables = {f"BEAR_LIMITS_{name.upper()}": str(low + 1)}
    assert getattr(load_config(file, environ=variables).limits, name) == low + 1


@pytest.mark.parametrize("text", ["max_answer = 1", "max_answers = 0", "max_constraint_depth = 1000"])
def test_a_limit_that_cannot_be_held_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bear.toml"
    file.write_text(f"[limits]\n{text}\n")
    with pytest.raises(ConfigError, match=r"max_answer|limits\.max_constraint_depth"):
        load_config(file, environ={})


@pytest.mark.parametrize(
    "source", [PromptInput("x" * (6 * 2**20)), TokensInput([2**31 - 1] * (3 * 2**19))], ids=["text", "ids"]
)
def test_the_largest_input_that_may_be_set_fits_a_frame(source: Any) -> None:
    frame = Submit(1, source, SamplingParams(), StopParams(), 0.0)
    assert len(msgspec.msgpack.encode(frame)) < MAX_FRAME_BYTES


@pytest.mark.parametrize("name", InputLimits.__struct_fields__)
def test_the_table_of_limits_tells_each_with_its_default(name: str) -> None:
    (row,) = [line for line in DOC.splitlines() if line.startswith(f"| `{name}` |")]
    default = row.split("|")[2].strip().replace(" ", "")
    units = {"KiB": 2**10, "MiB": 2**20}
    for unit, size in units.items():
        if default.endswith(unit):
            default = str(int(default.removesuffix(unit)) * size)
    assert float(default) == getattr(DEFAULT_LIMITS, name)
