"""Constrained answers: whatever the model would say, the text is one of those allowed."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from bear_grpc.v1 import inference_service_pb2 as inference_pb
from tests.helpers.rpc import Api, Code, collect, fails, stream_fails, text_of

STOP, LENGTH = inference_pb.FINISH_REASON_STOP, inference_pb.FINISH_REASON_LENGTH
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "age", "tame"],
    "additionalProperties": False,
}
LARK = 'start: word (" " word)~1..2\nword: "bear" | "fish"'
GBNF = 'root ::= word (" " word)? "."\nword ::= "bear" | "fish"'


async def answers(api: Api, model: str, **constraint: Any) -> list[tuple[str, inference_pb.Completed]]:
    """Texts of one greedy run and of some seeds, with their endings."""
    found = []
    for options in ({"temperature": 0}, {"temperature": 1, "seed": 1}, {"temperature": 1.5, "seed": 2}):
        events = await collect(api.generate(model, "a bear", max_tokens=200, **options, **constraint))
        assert events[-1].completed.HasField("constraint_satisfied")
        found.append((text_of(events), events[-1].completed))
    return found


@pytest.mark.parametrize("model", ["tiny", "bear-demo"])
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[a-c]{3,6}(x|y)"}, "[a-c]{3,6}(x|y)"),
        ({"choices": ["yes", "no", "yes and no", "ä"]}, "yes|no|yes and no|ä"),
        ({"lark": LARK}, "(bear|fish)( (bear|fish)){1,2}"),
        ({"gbnf": GBNF}, r"(bear|fish)( (bear|fish))?\."),
    ],
    ids=["regex", "choices", "lark", "gbnf"],
)
async def test_a_text_is_one_of_those_allowed(
    api: Api, tiny: str, demo: str, model: str, constraint: dict[str, Any], pattern: str
) -> None:
    for text, completed in await answers(api, model, **constraint):
        assert re.fullmatch(pattern, text), text
        assert completed.constraint_satisfied
        assert completed.finish_reason == STOP


@pytest.mark.parametrize("model", ["tiny", "bear-demo"])
async def test_a_json_schema_gives_json_of_that_schema(api: Api, tiny: str, demo: str, model: str) -> None:
    for text, completed in await answers(api, model, json_schema=SCHEMA):
        assert completed.constraint_satisfied
        jsonschema.validate(json.loads(text), SCHEMA)


async def test_a_text_cut_by_its_length_is_told_as_not_satisfied(api: Api, tiny: str) -> None:
    events = await collect(api.generate(tiny, "a bear", regex="[a-z]{30}", max_tokens=3))
    completed = events[-1].completed
    assert completed.finish_reason == LENGTH
    assert completed.HasField("constraint_satisfied")
    assert not completed.constraint_satisfied
    assert re.fullmatch("[a-z]{1,29}", text_of(events))


async def test_a_text_without_constraint_tells_nothing_of_one(api: Api, tiny: str) -> None:
    events = await collect(api.generate(tiny, "a bear", max_tokens=3))
    assert not events[-1].completed.HasField("constraint_satisfied")


async def test_every_one_of_several_answers_is_allowed(api: Api, demo: str) -> None:
    answer = await api.once(demo, "a bear", n=3, temperature=1.5, seed=3, choices=["yes", "no", "maybe"])
    assert {choice.text for choice in answer.choices} <= {"yes", "no", "maybe"}
    assert [choice.finish_reason for choice in answer.choices] == [STOP] * 3


@pytest.mark.parametrize(
    "constraint",
    [
        {"json_schema": "{"},
        {"json_schema": '{"type": "bears"}'},
        {"regex": "(a"},
        {"lark": "start: missing"},
        {"gbnf": "root ::= missing"},
    ],
    ids=str,
)
async def test_a_constraint_that_does_not_compile_is_refused(
    api: Api, tiny: str, constraint: dict[str, Any]
) -> None:
    seen, status = await stream_fails(
        api.generate(tiny, "a bear", **constraint), Code.INVALID_ARGUMENT, "GRAMMAR_INVALID"
    )
    assert seen == []
    assert len(status.message) > len("the constraint does not compile: ")
    await fails(api.once(tiny, "a bear", **constraint), Code.INVALID_ARGUMENT, "GRAMMAR_INVALID")
