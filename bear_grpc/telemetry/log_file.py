"""A log file that is rotated by its size. One thread; several servers may have the same file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..access.private import make_folder, open_private


class LogFile:
    """`bear.log`, then `bear.log.1` for what came before it, and so on, `count` files in all.

    Others may rotate or remove it meanwhile. After an error `write` may be called again: the file is
    opened anew then.
    """

    def __init__(self, path: Path, max_bytes: int, count: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._count = count
        self._fd = -1
        self._size = 0
        self._torn = False  # the last line is only partly there

    def write(self, line: str) -> None:
        """Appends a line. Blocking. Raises OSError if it cannot be written, all of it."""
        data = line.encode(errors="backslashreplace") + b"\n"
        try:
            self._open(len(data))
            if self._torn:
                data = b"\n" + data
            while data:  # a full disk takes a part, and tells of it at the next one
                written = os.write(self._fd, data)
                self._size += written
                data = data[written:]
                self._torn = bool(data)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Does nothing if it is not open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _open(self, size: int) -> None:
        """Has the file open, with room for `size` bytes."""
        if self._fd >= 0 and not self._is_ours():
            self.close()
        if self._fd < 0:
            self._open_new()
        if self._size and self._size + size > self._max_bytes:
            self.close()
            self._rotate()
            self._open_new()

    def _open_new(self) -> None:
        # Names of models, keys and tenants are for nobody else on this machine.
        make_folder(self.path.parent)
        self._fd = open_private(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._fd).st_size

    def _is_ours(self) -> bool:
        try:
            there, ours = os.stat(self.path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        self._size = there.st_size
        return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)

    def _rotate(self) -> None:
        paths = [self.path, *(self.path.with_name(f"{self.path.name}.{n}") for n in range(1, self._count))]
        for older, newer in zip(reversed(paths[1:]), reversed(paths[:-1]), strict=True):
            with contextlib.suppress(FileNotFoundError):
                newer.rename(older)
        if self._count == 1:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
