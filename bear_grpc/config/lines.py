"""Where in a TOML file each key stands: the parser does not tell."""

from __future__ import annotations

import re

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?\s*(?:#.*)?")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=(.*)")
_PART = re.compile(_KEY)
# What brackets in it do not count: strings, and what is behind a comment sign.
_QUIET = re.compile(r'"(?:[^"\\]|\\.)*"|' + r"'[^']*'|#.*")
_TRIPLE = re.compile('"""' + "|'''")


def lines_of(text: str) -> dict[str, int]:
    """The line, from 1, of each key by its dotted name; tables of a list are `name[0]` and so on.

    The text must be good TOML. A key inside an inline table has no line of its own.
    """
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    table, open_brackets, delimiter = "", 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        value = line
        if not delimiter and not open_brackets:
            if header := _HEADER.fullmatch(line):
                table = _resolved(_dotted(header[2]), counts)
                if header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                    table = f"{table}[{counts[table]}]"
                found.setdefault(table, number)
                continue
            if not (assigned := _ASSIGNMENT.fullmatch(line)):
                continue
            name = _dotted(assigned[1])
            found.setdefault(f"{table}.{name}" if table else name, number)
            value = assigned[2]
        value, delimiter = _outside(value, delimiter)
        value = _QUIET.sub("", value)
        open_brackets += sum(value.count(sign) for sign in "[{") - sum(value.count(sign) for sign in "]}")
    return found


def nearest_line(lines: dict[str, int], name: str) -> int:
    """The line of a key, or of the first table in it, or of the table or the list that it is in; else 0."""
    if name not in lines:
        name = next((key for key in lines if key.startswith((f"{name}.", f"{name}["))), name)
    while name and name not in lines:
        name = name[: max(name.rfind("."), name.rfind("["), 0)]
    return lines.get(name, 0)


def _outside(value: str, delimiter: str) -> tuple[str, str]:
    """What of a line is in no string of many lines, and the delimiter of the one that it leaves open."""
    kept = ""
    while True:
        if delimiter:
            _, ended, value = value.partition(delimiter)
            if not ended:
                return kept, delimiter
            value, delimiter = value.lstrip(delimiter[0]), ""
        begun = _TRIPLE.search(_masked(value))
        if begun is None:
            return kept + value, ""
        kept += value[: begun.start()]
        delimiter, value = begun[0], value[begun.end() :]


def _masked(value: str) -> str:
    """The line with its one-line strings and its comment as spaces."""
    pattern = r'"""' + r"|'''|" + _QUIET.pattern
    return re.sub(
        pattern, lambda match: match[0] if _TRIPLE.fullmatch(match[0]) else " " * len(match[0]), value
    )


def _dotted(key: str) -> str:
    return ".".join(part.strip("\"'") for part in _PART.findall(key))


def _resolved(table: str, counts: dict[str, int]) -> str:
    """A table's name with the places of the lists that it lies in."""
    parts: list[str] = []
    *outer, last = table.split(".")
    for part in outer:
        parts.append(part)
        name = ".".join(parts)
        if name in counts:
            parts[-1] = f"{part}[{counts[name]}]"
    return ".".join([*parts, last])
