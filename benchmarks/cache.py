"""Where benchmarks keep what is expensive to make: model files and the peer's programs."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from tools.llama_wheel import cache_root
from tools.progress import status


class SetupError(Exception):
    """Something that a benchmark needs cannot be had; the text says what and why."""


def folder(name: str) -> Path:
    """The cache's folder of that name, made if need be; beside the wheels that the installer keeps."""
    path = cache_root().parent / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Of several processes that want to make `path`, one does; the others wait for it."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with status(f"Another process makes {path.name}, waiting for it"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
