"""The error tree: its drawing, its reasons, and errors as data."""

from __future__ import annotations

import re

import pytest

from bear_grpc import errors
from bear_grpc.errors import BackendError, BearError, ErrorRecord, FieldViolation, from_record
from bear_grpc.framing import FrameBuffer, encode
from bear_grpc.protocol import Failed
from bear_grpc.v1 import errors_pb2
from tests.helpers.errors import EXAMPLES, LEAVES, TREE

REASONED = [kind for kind in TREE if "reason" in vars(kind)]


def drawn_tree() -> dict[str, str]:
    """Parent of each class, by the indentation of the module docstring's drawing."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │├└─]*)([A-Z]\w+)(?:  |$)", line)
        if match is None or not (match[1].strip() or match[2] == "BearError"):
            continue
        depth = len(match[1])
        while above and above[-1][0] >= depth:
            above.pop()
        parents[match[2]] = above[-1][1] if above else "Exception"
        above.append((depth, match[2]))
    return parents


def test_drawing_lists_exactly_the_tree():
    assert drawn_tree() == {kind.__name__: kind.__base__.__name__ for kind in TREE}


def test_examples_hold_every_class_that_is_raised():
    assert {*EXAMPLES} == {*LEAVES, BackendError}


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_leaf_has_a_reason_of_its_own_and_a_docstring(kind):
    assert "reason" in vars(kind)
    assert kind.__doc__


def test_reasons_are_unique():
    reasons = [kind.reason for kind in REASONED if kind is not BearError]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("kind", REASONED, ids=lambda kind: kind.__name__)
def test_reason_is_in_the_contract(kind):
    assert errors_pb2.ErrorReason.Value(f"ERROR_REASON_{kind.reason}") > 0


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_record_round_trip_over_a_frame_gives_an_equal_error(kind):
    error = EXAMPLES[kind]()
    [frame] = FrameBuffer(to_worker=False).feed(encode(Failed(error.to_record())))
    back = from_record(frame.error)
    assert type(back) is kind
    assert str(back) == str(error) == back.message
    assert back.to_record() == error.to_record()


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_metadata_is_text_by_text(kind):
    metadata = EXAMPLES[kind]().metadata
    assert all(type(key) is str and type(value) is str for key, value in metadata.items())


def test_from_record_unknown_reason_keeps_reason_and_message():
    back = from_record(ErrorRecord("NEW_REASON", "text"))
    assert type(back) is BearError
    assert (back.reason, back.message) == ("NEW_REASON", "text")
    assert BearError.reason == "INTERNAL"


def test_invalid_field_of_several_tells_all_in_its_message():
    violations = [FieldViolation("a", "must be 1"), FieldViolation("b", "is required")]
    error = errors.InvalidField.of(violations)
    assert error.violations == tuple(violations)
    assert str(error) == "a: must be 1; b: is required"


def test_context_length_exceeded_with_max_tokens_carries_both_numbers():
    assert errors.ContextLengthExceeded(10, 20, 25).metadata == {
        "prompt_token_count": "10",
        "max_tokens": "20",
        "context_length": "25",
    }


def test_context_length_exceeded_without_max_tokens_leaves_it_out():
    assert "max_tokens" not in errors.ContextLengthExceeded(30, None, 25).metadata
