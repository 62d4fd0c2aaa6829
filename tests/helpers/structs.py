"""Hypothesis strategies for our msgspec structs, from their annotations."""

from __future__ import annotations

import enum
import types
import typing
from typing import Any

import msgspec
from hypothesis import strategies as st

# Few letters, of one to four bytes: the whole of Unicode takes seconds to set up.
_TEXT = st.text('a\0"€🐻', max_size=6)
_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**31), 2**31 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: _TEXT,
    bytes: st.binary(max_size=8),
    type(None): st.none(),
    Any: st.none() | st.booleans() | st.floats(allow_nan=False) | _TEXT,
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation. Raises TypeError for one that is not known here."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args])
    if origin is list:
        return st.lists(values_of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=2)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values_of(hints[name]) for name in kind.__struct_fields__})
    raise TypeError(f"no values for {kind}")
