"""What a query of Prometheus names: metrics with the labels that are asked of them, labels to group by."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_SELECTOR = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(\{{(?:[^}}\"]|{_STRING.pattern})*\}})?(\s*\()?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*("(?:[^"\\]|\\.)*")')
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring"}


@dataclass
class Query:
    """`metrics` are names with the matchers of each: (label, operator, value)."""

    metrics: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)
    grouped_by: set[str] = field(default_factory=set)


def read(text: str) -> Query:
    """Raises ValueError for brackets that do not match."""
    bare = _STRING.sub('""', text)
    for opens, closes in ("()", "{}", "[]"):
        if bare.count(opens) != bare.count(closes):
            raise ValueError(text)
    query = Query()
    for _, labels in _GROUPING.findall(text):
        query.grouped_by |= {label.strip() for label in labels.split(",") if label.strip()}
    for name, matchers, is_call in _SELECTOR.findall(_RANGE.sub("", _GROUPING.sub("", text))):
        if is_call or name in _WORDS:
            continue
        found = [(label, how, value.strip('"')) for label, how, value in _MATCHER.findall(matchers)]
        query.metrics.append((name, found))
    return query
