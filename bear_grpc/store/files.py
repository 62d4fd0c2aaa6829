"""Small files that are whole at any time, and names that outlive a loss of power."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"


def write_whole(file: Path, data: bytes) -> None:
    """Writes beside the place and renames: a crash leaves the old file or the new one. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent, suffix=TEMPORARY_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Has the folder's names on the disk, after a rename that must last. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
