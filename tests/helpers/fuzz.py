"""Requests of every kind, from the descriptors of the API: any field may be set, to what is usual or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from hypothesis import strategies as st

from bear_grpc.v1 import inference_service_pb2, model_service_pb2, server_service_pb2

MOST_FIELDS, MOST_ITEMS, DEEPEST = 3, 4, 5

_EDGES = (0, 1, -1, 2, 7, 127, 2**15, 2**31 - 1, -(2**31), 2**31, 2**53, 2**63 - 1, -(2**63))
_TEXTS = (
    "",
    " ",
    "\0",
    "<s>",
    "</s>",
    "<|im_start|>",
    "{{ x }}",
    "{% for a in range(10**9) %}",
    "\N{BEAR FACE}" * 20,
    "e\N{COMBINING ACUTE ACCENT}" * 50,
    "a" * 5_000,
    "\u202e\ufeff\ufffd",
    "../../etc/passwd",
    "root ::= root",
    'start: "a" start',
    "(a*)*b",
    "[" * 300,
    '{"type": "object"}',
    '{"$ref": "#"}',
    "owner/repo:Q4_K_M",
)
_SANE_TEXTS = st.sampled_from(["hello", "the bear", "user", "a", "is one river"])
_SIZES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def methods() -> list[MethodDescriptor]:
    """Every method of the API."""
    files = (inference_service_pb2, model_service_pb2, server_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return [method for service in services for method in service.methods]


def requests(descriptor: Descriptor, model: str, base: Message | None = None) -> st.SearchStrategy[Message]:
    """Messages of a kind: `base` with some fields set. Those named `model` or `name` are mostly `model`."""
    make: Callable[[], Message] = message_factory.GetMessageClass(descriptor)

    def over(found: Message) -> Message:
        whole = make()
        if base is not None:
            whole.CopyFrom(base)
        for field, value in found.ListFields():
            if field.containing_oneof is not None:
                whole.ClearField(field.name)
            # What is repeated takes the place of what was there, as a single value does.
            if field.is_repeated:
                whole.ClearField(field.name)
                getattr(whole, field.name).MergeFrom(value)
            elif field.message_type is not None:
                getattr(whole, field.name).MergeFrom(value)
                getattr(whole, field.name).SetInParent()
            else:
                setattr(whole, field.name, value)
        return whole

    return _messages(descriptor, model, DEEPEST).map(over)


def _messages(descriptor: Descriptor, model: str, depth: int) -> st.SearchStrategy[Message]:
    make: Callable[[], Message] = message_factory.GetMessageClass(descriptor)
    if descriptor.full_name == Duration.DESCRIPTOR.full_name:
        return st.builds(Duration, seconds=st.sampled_from([0, 1, -1, 5, 2**40]), nanos=st.integers(-9, 9))
    if descriptor.full_name == Struct.DESCRIPTOR.full_name:
        return st.dictionaries(_SANE_TEXTS, st.sampled_from([None, True, 1.5, "x"]), max_size=3).map(_struct)
    fields = list(descriptor.fields)
    if not fields or not depth:
        return st.builds(make)

    @st.composite
    def message(draw: st.DrawFn) -> Message:
        found = make()
        for field in draw(
            st.lists(st.sampled_from(fields), max_size=MOST_FIELDS, unique_by=lambda f: f.name)
        ):
            value = draw(_values(field, model, depth - 1))
            if field.is_repeated:
                getattr(found, field.name).extend(value)
            elif field.message_type is not None:
                getattr(found, field.name).CopyFrom(value)
            else:
                setattr(found, field.name, value)
        return found

    return message()


def _values(field: FieldDescriptor, model: str, depth: int) -> st.SearchStrategy[Any]:
    one = _one(field, model, depth)
    return st.lists(one, max_size=MOST_ITEMS) if field.is_repeated else one


def _one(field: FieldDescriptor, model: str, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return _messages(field.message_type, model, depth)
    if field.enum_type is not None:
        numbers = [value.number for value in field.enum_type.values]
        return st.sampled_from([*numbers, *numbers, 99, -1])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        texts = st.one_of(
            _SANE_TEXTS, st.sampled_from(_TEXTS), st.text(st.characters(codec="utf-8"), max_size=40)
        )
        return st.one_of(st.just(model), st.just(model), texts) if field.name in ("model", "name") else texts
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=40)
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        odd = st.sampled_from([0.0, -0.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan])
        return st.one_of(st.floats(0, 1), st.floats(0, 2), odd)
    low, high = _SIZES[field.type]
    odd_numbers = st.sampled_from([number for number in _EDGES if low <= number <= high])
    return st.one_of(st.integers(0, 8), st.integers(0, 300), odd_numbers)


def _struct(values: dict[str, Any]) -> Struct:
    found = Struct()
    found.update(values)
    return found
