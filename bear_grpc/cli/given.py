"""Values of `bear run`'s options that need more than typer: texts or files, and named sampling values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer


def text_of_file(path: str | None) -> str | None:
    """The text in a file; None for None. Raises BadParameter."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path}: is no UTF-8 text") from None


def text_or_file(given: str | None) -> str | None:
    """JSON as it is given, or what is in the file of that name."""
    if given is None or given.lstrip()[:1] in ("{", "[") or given.strip() in ("true", "false"):
        return given
    return text_of_file(given)


def sampling_values(pairs: Sequence[str]) -> dict[str, Any]:
    """Sampling options of the client from `name=value`. Raises BadParameter.

    Lists are comma separated or JSON; `logit_bias` is `TOKEN:BIAS,...`.
    """
    from bear_grpc.v1.inference_service_pb2 import SamplingParams

    fields = SamplingParams.DESCRIPTOR.fields_by_name
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in fields:
            raise typer.BadParameter(f"{pair!r} is no NAME=VALUE with a name of {', '.join(fields)}")
        try:
            values[name] = _value(fields[name], text.strip())
        except ValueError as error:
            raise typer.BadParameter(f"{pair!r}: {error}") from None
    return values


def _value(field: Any, text: str) -> Any:
    if field.name == "logit_bias":
        pairs = [part.partition(":") for part in text.split(",")]
        return {int(token): float(bias) for token, _, bias in pairs}
    if field.is_repeated:
        return json.loads(text) if text.startswith("[") else text.split(",")
    return float(text) if field.cpp_type == field.CPPTYPE_DOUBLE else int(text)
