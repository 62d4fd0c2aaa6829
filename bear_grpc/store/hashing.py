"""The SHA-256 of a file, also while its bytes are still coming."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

READ_BYTES = 2**20


def hash_file(handle: int, size_bytes: int, available: Callable[[int], int]) -> str:
    """SHA-256 of the first `size_bytes` bytes, in hex; of fewer where the file is shorter.

    `available` is asked before each piece, with the position: it gives the end of what may be read, and
    may wait, or raise to stop. Raises OSError.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    position = 0
    while position < size_bytes:
        stop = min(available(position), size_bytes)
        count = os.preadv(handle, [buffer[: min(READ_BYTES, stop - position)]], position)
        if not count:
            break
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()
