"""Constraints from protobuf: their sizes, and how deeply their texts nest. What compiles is the worker's."""

from __future__ import annotations

import re

from ..errors import InvalidField
from ..input_limits import DEFAULT_LIMITS, InputLimits
from ..params import Constraint, ConstraintKind
from ..v1 import inference_service_pb2 as pb
from .convert import Collector

# What holds brackets that do not nest, first; then a bracket. What is not closed goes to the end:
# it is searched once.
_STRING = r'"(?:[^"\\]|\\.)*+"?'
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_BRACKET = r"[(\[{]|[)\]}]"
_PARTS = {
    ConstraintKind.JSON_SCHEMA: re.compile(rf"{_STRING}|{_BRACKET}", re.DOTALL),
    ConstraintKind.GBNF: re.compile(rf"{_STRING}|#[^\n]*+|\[(?:[^\]\\]|\\.)*+\]?|{_BRACKET}", re.DOTALL),
    ConstraintKind.LARK: re.compile(
        rf'"(?:[^"\\\n]|\\.)*+"?|(?://|#)[^\n]*+|/(?:[^/\\\n]|\\.)*+/?|{_BRACKET}', re.DOTALL
    ),
}


def constraint_from_proto(
    request: pb.GenerateRequest, limits: InputLimits = DEFAULT_LIMITS
) -> Constraint | None:
    """None if the request has no constraint. Raises InvalidField."""
    if not request.HasField("constraint"):
        return None
    which = request.constraint.WhichOneof("kind")
    if which is None:
        raise InvalidField("constraint", "one of json_schema_json, regex, choices, lark, gbnf is required")
    kind = ConstraintKind(which.removesuffix("_json"))
    if which == "choices":
        return Constraint(kind, choices=_choices(request.constraint.choices, limits))
    text: str = getattr(request.constraint, which)
    field = f"constraint.{which}"
    _check_size(field, len(text.encode()), limits)
    depth = nesting(kind, text)
    if depth > limits.max_constraint_depth:
        most = limits.max_constraint_depth
        raise InvalidField(field, f"must nest at most {most} brackets, nests {depth}")
    return Constraint(kind, text)


def nesting(kind: ConstraintKind, text: str) -> int:
    """How deep the brackets of a text go; 0 for kinds whose compilers bound it themselves."""
    parts = _PARTS.get(kind)
    depth = deepest = 0
    for part in parts.finditer(text) if parts is not None else ():
        if part[0] in _OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif part[0] in _CLOSING:
            depth = max(0, depth - 1)
    return deepest


def _choices(message: pb.Choices, limits: InputLimits) -> tuple[str, ...]:
    wrong = Collector()
    field, values = "constraint.choices.values", tuple(message.values)
    if not 1 <= len(values) <= limits.max_choices:
        wrong.add(field, f"must hold 1 to {limits.max_choices}, has {len(values)}")
    wrong.take(lambda: _check_size(field, sum(len(value.encode()) for value in values), limits), None)
    wrong.raise_found()
    return values


def _check_size(field: str, size: int, limits: InputLimits) -> None:
    if size > limits.max_constraint_bytes:
        raise InvalidField(field, f"must be at most {limits.max_constraint_bytes} bytes, is {size}")
