"""Locks between processes: a kill gives them back, whatever it interrupts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileLock:
    """A lock that one holder has at a time, of all threads and processes that use the file. One thread only.

    The file is there while somebody holds the lock; what a kill leaves of it is taken by the next one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Takes the lock if nobody holds it; never waits. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(handle):
                    self._handle = handle
                    return True
            except BlockingIOError:
                os.close(handle)
                return False
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def release(self) -> None:
        """Gives the lock back and removes the file; nothing if it is not held."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        try:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(handle)

    def _is_current(self, handle: int) -> bool:
        """Whether the file is still the one at the path: its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(handle), self._path.stat())
        except FileNotFoundError:
            return False


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Waits for the lock of a file that stays there: for what takes a moment only. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
