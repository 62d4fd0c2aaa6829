"""Whatever the schema: the text that its masks allow is JSON that the schema holds for."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bear_grpc.backend.base import Backend
from bear_grpc.params import Constraint, ConstraintKind
from bear_grpc.testing import FakeVocabulary
from bear_grpc.testing.constraint import write

Schema = dict[str, Any]

# What `re` and llguidance understand alike, and JSON schema finds anywhere in a text.
PATTERNS = ["^[a-c]{2,4}$", "^(x|yz)+$", "[a-m]", "^A", r"^\d{3}-[0-9a-f]+$", "^.?(é|🐻)", r"^[^\"\\]{0,3}$"]
FORMATS = ["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname", "duration"]
NAMES = ["a", "b", "name", "with space", 'q"\\', "é", "🐻", "a/b", ""]
VALUES = st.sampled_from([None, True, False, 0, -3, 2.5, "", "x", 'q"\\\n', "日本", [1, "a"], {"k": [None]}])


def bounded(low: st.SearchStrategy[Any], high: st.SearchStrategy[Any], names: tuple[str, str]) -> Any:
    """Each bound, both in order, or none."""
    both = st.tuples(low, high).map(lambda pair: dict(zip(names, sorted(pair), strict=True)))
    return st.one_of(st.just({}), low.map(lambda x: {names[0]: x}), high.map(lambda x: {names[1]: x}), both)


def kind(name: str, *parts: Any) -> st.SearchStrategy[Schema]:
    """A schema of one type with keywords from each part."""
    return st.tuples(*parts).map(
        lambda found: {"type": name} | {k: v for part in found for k, v in part.items()}
    )


small = st.integers(-1200, 1200)
halves = st.integers(-500, 500).map(lambda n: n / 4)
lengths = st.integers(0, 6)
LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["integer", "null"]}]),
    kind("integer", bounded(small, small, ("minimum", "maximum"))),
    kind("number", bounded(halves, halves, ("minimum", "maximum"))),
    kind("integer", st.sampled_from([1, 2, 5, 7, 12, 100]).map(lambda n: {"multipleOf": n})),
    kind("integer", st.fixed_dictionaries({"exclusiveMinimum": small})),
    kind("string", bounded(lengths, lengths, ("minLength", "maxLength"))),
    kind("string", st.sampled_from(PATTERNS).map(lambda pattern: {"pattern": pattern})),
    kind("string", st.sampled_from(FORMATS).map(lambda name: {"format": name})),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)


def objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    """Objects with some of their properties required, and others allowed or not."""
    properties = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    required = properties.flatmap(
        lambda found: st.fixed_dictionaries(
            {
                "properties": st.just(found),
                "required": st.lists(st.sampled_from(sorted(found)), unique=True) if found else st.just([]),
            }
        )
    )
    additional = st.one_of(st.booleans(), inner).map(lambda found: {"additionalProperties": found})
    return kind("object", required, additional)


def arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    """Arrays of one kind of item, and with first items of their own."""
    counts = bounded(st.integers(0, 3), st.integers(3, 5), ("minItems", "maxItems"))
    first = st.lists(inner, max_size=2).map(lambda found: {"prefixItems": found} if found else {})
    return kind("array", inner.map(lambda found: {"items": found}), counts, first)


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found}),
        inner.map(lambda found: {"$ref": "#/$defs/it", "$defs": {"it": found}}),
    ),
    max_leaves=6,
)
FAKE = FakeVocabulary()
SETTINGS = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def constraint_of(schema: Schema) -> Constraint:
    # A `$ref` counts from the root, and what is below a root here has roots of its own: each is lifted.
    definitions: Schema = {}

    def lifted(node: Any) -> Any:
        if isinstance(node, list):
            return [lifted(below) for below in node]
        if not isinstance(node, dict):
            return node
        if "$defs" in node:
            name = f"it{len(definitions)}"
            definitions[name] = None
            definitions[name] = lifted(node["$defs"]["it"])
            return {"$ref": f"#/$defs/{name}"}
        return {key: lifted(below) for key, below in node.items()}

    whole = lifted(schema)
    return Constraint(
        ConstraintKind.JSON_SCHEMA, json.dumps(whole | ({"$defs": definitions} if definitions else {}))
    )


def check(constraint: Constraint, text: bytes) -> None:
    validator = jsonschema.Draft202012Validator(
        json.loads(constraint.text), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    validator.validate(json.loads(text))


@SETTINGS
@given(schema=SCHEMAS, seed=st.integers(0, 9))
def test_text_of_any_schema_is_valid(schema, seed):
    constraint = constraint_of(schema)
    check(constraint, write(FAKE.compile(constraint), FAKE, seed=seed))


@pytest.mark.parametrize("name", FORMATS)
def test_text_of_any_format_is_valid(name):
    constraint = constraint_of({"type": "string", "format": name})
    for seed in range(10):
        check(constraint, write(FAKE.compile(constraint), FAKE, seed=seed))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_of_any_pattern_is_found_by_it(pattern):
    constraint = constraint_of({"type": "string", "pattern": pattern})
    for seed in range(10):
        text = write(FAKE.compile(constraint), FAKE, seed=seed)
        assert re.search(pattern, json.loads(text))


MIXED: list[Schema] = [
    {
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "tags": {"type": "array", "items": {"enum": ["x", "yy", "é"]}, "minItems": 1, "maxItems": 3},
            "at": {"anyOf": [{"type": "null"}, {"type": "number", "minimum": -1.5, "maximum": 99.25}]},
        },
        "required": ["id", "tags"],
        "additionalProperties": False,
    },
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "below": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
    {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 99, "multipleOf": 7}]},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "boolean"}]},
    {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"], "minProperties": 1},
]


@pytest.mark.parametrize("schema", MIXED, ids=lambda schema: json.dumps(schema)[:40])
def test_text_of_a_mixed_schema_is_valid_with_every_vocabulary(backend: Backend, schema: Schema):
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    matcher = backend.vocabulary.compile(constraint)
    for seed in range(6):
        check(constraint, write(matcher.copy(), backend.vocabulary, seed=seed))
