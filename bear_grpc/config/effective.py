"""The settings in force as TOML with the origin of each, and as JSON. Secrets are masked."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from .fields import extra_of, shape_of
from .sources import DEFAULT, Settings

MASK = "***"


class Effective(msgspec.Struct, frozen=True):
    """One setting with its value, as TOML and JSON have it; None is not set."""

    name: str
    value: Any
    origin: str
    path: tuple[str, ...]

    @property
    def table(self) -> tuple[str, ...]:
        """The keys of the table that it is in."""
        return self.path[:-1]


def effective(settings: Settings) -> list[Effective]:
    """Every setting with its value; of tables that a user names, those that are set."""
    return list(_walk(settings.config, "", (), settings.origins))


def to_toml(settings: Settings) -> str:
    """A file that says the same, each line with its origin; what is not set is a comment."""
    lines: list[str] = []
    table: tuple[str, ...] = ()
    rows = [(item, _line(item)) for item in effective(settings)]
    width = min(max(len(line) for _, line in rows), 48)
    for item, line in rows:
        if item.table != table:
            table = item.table
            lines += ["", _header(table)]
        lines.append(f"{line:<{width}}  # {item.origin}")
    return "\n".join(lines) + "\n"


def to_json(settings: Settings) -> str:
    """An object with `file` and `settings`, which has `value` and `origin` by dotted name."""
    told = {item.name: {"value": _plain(item.value), "origin": item.origin} for item in effective(settings)}
    file = None if settings.file is None else str(settings.file)
    return json.dumps({"file": file, "settings": told}, ensure_ascii=False, indent=2)


def _walk(
    struct: msgspec.Struct,
    name: str,
    path: tuple[str, ...],
    origins: dict[str, str],
    *,
    is_named: bool = False,
) -> Iterator[Effective]:
    """`is_named`: in a table that the user has named, where only what is set is of interest."""
    tables = []
    for field in msgspec.structs.fields(struct):
        value, shape = getattr(struct, field.name), shape_of(field.type)
        if shape.struct is not None:
            tables.append((field.name, value, shape))
            continue
        own = f"{name}{field.name}"
        if value is None and is_named:
            continue
        shown = MASK if value and extra_of(field.type).get("secret") else as_toml(value)
        yield Effective(own, shown, origins.get(own, DEFAULT), (*path, field.name))
    for key, value, shape in tables:  # which come last in TOML
        own, inner = f"{name}{key}", (*path, key)
        if value is None:
            continue
        if shape.by_name:
            for part, item in value.items():
                yield from _walk(item, f"{own}.{part}.", (*inner, part), origins, is_named=True)
        elif shape.in_list:
            for place, item in enumerate(value):
                yield from _walk(item, f"{own}[{place}].", (*inner, f"[{place}]"), origins, is_named=True)
        else:
            yield from _walk(value, f"{own}.", inner, origins, is_named=is_named)


def as_toml(value: Any) -> Any:
    """A setting's value in TOML's own types."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(as_toml(item) for item in value)
    if isinstance(value, list | tuple):
        return [as_toml(item) for item in value]
    if isinstance(value, dict):
        return {str(key): as_toml(item) for key, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """JSON knows no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _line(item: Effective) -> str:
    key = _key(item.path[-1])
    return f"# {key} is not set" if item.value is None else f"{key} = {toml_value(item.value)}"


def _header(path: tuple[str, ...]) -> str:
    if path[-1].startswith("["):
        return f"[[{'.'.join(_key(part) for part in path if not part.startswith('['))}]]"
    return f"[{'.'.join(_key(part) for part in path if not part.startswith('['))}]"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if bare else _text(name)


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return _text(value)
        case list():
            return f"[{', '.join(map(toml_value, value))}]"
        case dict():
            return f"{{{', '.join(f'{_key(key)} = {toml_value(item)}' for key, item in value.items())}}}"
        case _:
            return repr(value)


def _text(text: str) -> str:
    """JSON's strings are TOML's, but for one control character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
