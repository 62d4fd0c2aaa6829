"""The folders that models may be registered from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidField, PathNotAllowed


def resolve(path: str, roots: Sequence[Path]) -> Path:
    """The file that a path leads to. Blocking. Raises InvalidField, PathNotAllowed.

    Whether it may be used is asked before whether it exists.
    """
    if not path:
        raise InvalidField("path", "is required")
    if "\0" in path or not Path(path).is_absolute():
        raise InvalidField("path", "must be an absolute path on the server")
    try:
        real = Path(path).resolve()
    except (OSError, RuntimeError) as exc:
        raise PathNotAllowed(path) from exc
    if not any(real.is_relative_to(root) for root in roots):
        raise PathNotAllowed(path)
    return real
