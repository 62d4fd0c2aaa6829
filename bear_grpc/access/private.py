"""Files for the server's user only, also where root makes them: `sudo bear keys` locks no server out."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def make_folder(folder: Path) -> None:
    """The folder, for its owner only if it is new, and those above it. Raises OSError."""
    if folder.is_dir():
        return
    missing = [each for each in folder.parents if not each.exists()]
    for each, mode in ((folder, 0o700), *((parent, 0o777) for parent in missing))[::-1]:
        try:
            each.mkdir(mode)
        except FileExistsError:
            if not each.is_dir():
                raise
            continue
        fd = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _hand_over(fd, each.parent)
        finally:
            os.close(fd)


def open_private(file: Path, flags: int) -> int:
    """The file, opened; made for its owner only where there is none. Raises OSError."""
    flags |= os.O_CREAT | os.O_CLOEXEC
    try:
        fd = os.open(file, flags | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(file, flags, 0o600)
    _hand_over(fd, file.parent)
    return fd


def make_private(file: Path) -> None:
    """The file and its folder, which nobody else may write and, if they are new, not read. Raises OSError."""
    make_folder(file.parent)
    folder = file.parent.stat()
    others = stat.S_IWGRP | stat.S_IWOTH
    # Who may write in the folder may put another file in the place of this one; a sticky one keeps them off.
    if folder.st_mode & others and not folder.st_mode & stat.S_ISVTX and folder.st_uid == os.geteuid():
        file.parent.chmod(stat.S_IMODE(folder.st_mode) & ~others)
    os.close(open_private(file, os.O_RDWR | os.O_NOFOLLOW))
    keep_private(file)


def keep_private(file: Path) -> None:
    """Takes from others what they may do with the file, if it is this process's user's. Raises OSError."""
    fd = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_IMODE(status.st_mode) & 0o077 and status.st_uid == os.geteuid():
            # SQLite gives what it makes beside it the same mode and, as root, the same owner.
            os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _hand_over(fd: int, folder: Path) -> None:
    """What root has just made belongs to the owner of the folder that it lies in."""
    if os.geteuid() != 0:
        return
    owner = folder.stat()
    with contextlib.suppress(OSError):  # a container may have taken the right to do so from root
        os.fchown(fd, owner.st_uid, owner.st_gid)
