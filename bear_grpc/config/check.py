"""Values against the types of the settings: each problem with its setting's full name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from .fields import all_settings, fields_of, shape_of

_PATH = re.compile(r" - at `\$(.*)`$")


class Checked(msgspec.Struct):
    """What a value came to, and the names of all settings in it."""

    value: Any = None
    names: list[str] = msgspec.field(default_factory=list)


def convert(
    value: Any,
    kind: Any,
    where: Callable[[str], str],
    problems: list[str],
    *,
    name: str = "",
    is_text: bool = False,
) -> Checked:
    """The value as its type has it, tables as dictionaries; what is wrong is added to `problems`.

    `where` tells where a setting was told; `is_text` takes numbers and truth values from text.
    """
    shape, made = shape_of(kind), Checked()

    def inner(value: Any, kind: Any, name: str) -> Any:
        checked = convert(value, kind, where, problems, name=name, is_text=is_text)
        made.names += checked.names
        return checked.value

    def wrong(problem: str) -> Checked:
        problems.append(f"{where(name)}: {name}: {problem}")
        return made

    if shape.struct is None:
        made.names.append(name)
        try:
            made.value = msgspec.convert(value, kind, strict=not is_text, dec_hook=_decode)
        except msgspec.ValidationError as exc:
            path = _PATH.search(str(exc))
            problem = _PATH.sub("", str(exc))
            if is_text:
                problem = problem.replace("got `str`", f"got {value!r}")
            name += path[1] if path else ""
            return wrong(problem[:1].lower() + problem[1:])
    elif shape.in_list:
        if not isinstance(value, list):
            return wrong(f"expected tables, written as [[{name}]]")
        made.value = [inner(item, shape.struct, f"{name}[{place}]") for place, item in enumerate(value)]
    elif not isinstance(value, dict):
        return wrong("expected a table")
    elif shape.by_name:
        made.value = {key: inner(item, shape.struct, _join(name, key)) for key, item in value.items()}
    else:
        fields = fields_of(shape.struct)
        strange = [key for key in value if key not in fields]
        problems += [f"{where(_join(name, key))}: {unknown(_join(name, key), fields)}" for key in strange]
        made.value = {
            key: inner(item, fields[key], _join(name, key)) for key, item in value.items() if key in fields
        }
        missing = [
            field.name
            for field in msgspec.structs.fields(shape.struct)
            if field.required and field.name not in value
        ]
        problems += [f"{where(name)}: {_join(name, key)}: is required" for key in missing]
    return made


def unknown(name: str, siblings: Iterable[str] = ()) -> str:
    """That there is no such setting, and which is nearest: of the same table, else of any."""
    table, _, key = name.rpartition(".")
    near = [_join(table, found) for found in difflib.get_close_matches(key, list(siblings), n=1)]
    near = near or difflib.get_close_matches(name, all_settings(), n=1) or _of_another_table(key)
    return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _of_another_table(key: str) -> list[str]:
    ends = {name.rpartition(".")[2]: name for name in reversed(all_settings())}
    return [ends[found] for found in difflib.get_close_matches(key, ends, n=1)]


def _decode(kind: type, value: Any) -> Any:
    if kind is Path:
        if not isinstance(value, str):
            raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
        return Path(value).expanduser()
    raise NotImplementedError(kind)


def _join(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key
