"""A page of memory that a worker shares with the server: what it is working on at this moment.

After a death the server reads from it whose work it was. The worker writes it around
every step, so it costs a few microseconds and no system call.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Collection

import msgspec

PAGE_BYTES = 4096
# The text job, and how many ids of sequences follow.
_HEADER = struct.Struct("<QQ")
MAX_IDS = (PAGE_BYTES - _HEADER.size) // 8


class Suspects(msgspec.Struct, frozen=True):
    """Ids of the sequences in the step, and of the text job, that were under way; 0: no job."""

    sequences: tuple[int, ...] = ()
    text_job: int = 0


def create() -> int:
    """A file descriptor of an empty page, to be inherited. Raises OSError."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("bear-suspects")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.truncate(fd, PAGE_BYTES)
    except OSError:
        os.close(fd)
        raise
    return fd


class SuspectsPage:
    """The page behind a descriptor, which is no longer needed afterwards.

    The worker's owner calls `mark_step`, its text thread `mark_text`: each writes its own part.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)

    def mark_step(self, ids: Collection[int]) -> None:
        """The sequences of the step that begins; none when it has ended."""
        shown = list(ids)[:MAX_IDS]
        # The count is written last: an end in between leaves no ids that were not written.
        struct.pack_into("<Q", self._map, 8, 0)
        struct.pack_into(f"<{len(shown)}Q", self._map, _HEADER.size, *shown)
        struct.pack_into("<Q", self._map, 8, len(shown))

    def mark_text(self, job: int) -> None:
        """The text job that begins; 0 when it has ended."""
        struct.pack_into("<Q", self._map, 0, job)

    def read(self) -> Suspects:
        """What is written; a worker is not trusted to have written sense."""
        job, count = _HEADER.unpack_from(self._map, 0)
        count = min(count, MAX_IDS)
        return Suspects(struct.unpack_from(f"<{count}Q", self._map, _HEADER.size), job)

    def close(self) -> None:
        """Gives the memory back."""
        self._map.close()
