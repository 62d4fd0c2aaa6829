"""Log records as lines: for people, and for programs.

Whoever logs gives what is structured as `extra={"fields": {...}}`.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from typing import Any

# A message may have several lines; nothing in it may move a terminal's cursor or look like another line
# of ours, so what is not printable is shown by its code.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")
_BARE = re.compile(r"[\w.,:/@+-]+")


def as_text(record: logging.LogRecord) -> str:
    """`2026-01-31 12:00:00,000 INFO bear_grpc.server: message key=value`."""
    when = datetime.datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds").replace(".", ",")
    words = [f"{when} {record.levelname} {record.name}: {record.getMessage()}"]
    words += [f"{name}={_value(value)}" for name, value in _fields(record).items()]
    text = " ".join(words)
    if trace := _trace(record):
        text += f"\n{trace}"
    return _UNPRINTABLE.sub(lambda found: rf"\x{ord(found[0]):02x}", text)


def as_json(record: logging.LogRecord) -> str:
    """One object on one line; `time` is UTC."""
    when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    values: dict[str, Any] = {
        "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
    }
    values = {**values, **_fields(record), **values}
    if trace := _trace(record):
        values["trace"] = trace
    return json.dumps(values, default=str, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _value(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_value, value))
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _trace(record: logging.LogRecord) -> str:
    if record.exc_text:
        return record.exc_text
    if record.exc_info:
        return logging.Formatter().formatException(record.exc_info)
    return ""
