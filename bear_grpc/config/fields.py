"""The settings as their types tell them: names with their tables, what each is and means."""

from __future__ import annotations

import enum
import functools
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .settings import ServerConfig

PREFIX = "BEAR_"
# Stand for a name that the user gives, and for a place in a list of tables.
NAME, PLACE = "NAME", "[]"
_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}


class Setting(msgspec.Struct, frozen=True):
    """One setting. `name` holds its tables: `limits.max_answers`, `models.NAME.defaults.top_k`.

    `kind` is its annotated type; `default` its default, or what the reference tells in place of it.
    """

    name: str
    kind: Any
    default: Any
    description: str
    reloads: bool
    is_secret: bool
    told_default: str

    @property
    def table(self) -> str:
        """The table of the file that it belongs to, empty for none."""
        return self.name.rpartition(".")[0]

    @property
    def variable(self) -> str:
        """Its environment variable, empty where only a file can tell it."""
        if NAME in self.name.split(".") or PLACE in self.name or shape_of(self.kind).is_tables:
            return ""
        return PREFIX + self.name.replace(".", "_").upper()

    @property
    def type_name(self) -> str:
        """Its type in words."""
        return _type_name(self.kind)


class Shape(msgspec.Struct, frozen=True):
    """What a type is to a file: a table, tables by name, a list of tables, or a value (`struct` None)."""

    struct: type[msgspec.Struct] | None = None
    by_name: bool = False
    in_list: bool = False
    is_list: bool = False

    @property
    def is_tables(self) -> bool:
        """Whether there are many tables of it."""
        return self.by_name or self.in_list


@functools.cache
def shape_of(kind: Any) -> Shape:
    """The shape of a field's type."""
    kind = bare(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return Shape(kind)
    if origin in (types.UnionType, typing.Union):
        shapes = [shape_of(arg) for arg in args if arg is not types.NoneType]
        return next((shape for shape in shapes if shape.struct is not None or shape.is_list), Shape())
    if origin is dict:
        return Shape(shape_of(args[1]).struct, by_name=True)
    if origin in (list, tuple, set, frozenset):
        struct = shape_of(args[0]).struct
        return Shape(struct, in_list=struct is not None, is_list=True)
    return Shape()


def bare(kind: Any) -> Any:
    """A type without what is annotated to it."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def fields_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """The annotated types of a table's settings."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


@functools.cache
def all_settings() -> dict[str, Setting]:
    """Every setting by its name, in the order of the types."""
    return {setting.name: setting for setting in settings_of(ServerConfig)}


@functools.cache
def reloading() -> frozenset[str]:
    """What a running server may take over, by dotted name; many tables of a kind are one."""
    return frozenset(_reloading(ServerConfig, ""))


def _reloading(struct: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        shape, name = shape_of(field.type), prefix + field.name
        if extra_of(field.type).get("reloads"):
            yield name
        elif shape.struct is not None and not shape.is_tables:
            yield from _reloading(shape.struct, f"{name}.")


def extra_of(kind: Any) -> dict[str, Any]:
    """What is annotated to a type besides its description."""
    return {key: value for meta in _metas(kind) for key, value in (meta.extra or {}).items()}


def _metas(kind: Any) -> tuple[msgspec.Meta, ...]:
    return typing.get_args(kind)[1:] if typing.get_origin(kind) is Annotated else ()


def settings_of(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[Setting]:
    """Every setting of a table and of those in it."""
    for field in msgspec.structs.fields(struct):
        shape, name = shape_of(field.type), prefix + field.name
        if shape.struct is not None:
            name += f".{NAME}" if shape.by_name else PLACE if shape.in_list else ""
            yield from settings_of(shape.struct, f"{name}.")
            continue
        extra = extra_of(field.type)
        yield Setting(
            name,
            field.type,
            msgspec.NODEFAULT if field.required else default_of(field),
            next((meta.description for meta in _metas(field.type) if meta.description), ""),
            bool(extra.get("reloads")),
            bool(extra.get("secret")),
            str(extra.get("default", "")),
        )


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    """The default of a field that has one."""
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def _type_name(kind: Any) -> str:
    kind = bare(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{value.value}`" for value in kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(arg) for arg in args if arg is not types.NoneType)
    if origin in (list, tuple, set, frozenset):
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return f"table of {_type_name(args[1])}"
    raise TypeError(f"a setting cannot be {kind}")
