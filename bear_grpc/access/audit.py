"""The audit log: who changed what of a server, one JSON line each, every line chained to the one before."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from pathlib import Path

import msgspec

from .private import make_folder, open_private

FILE = "audit.log"
# What a request can make of a line is bounded; what is above is cut.
MAX_SUBJECT_CHARS, MAX_SUBJECTS = 256, 32
_FIRST = "0" * 64
_BLOCK = 65_536


class Entry(msgspec.Struct, frozen=True):
    """One action. `time_s` is seconds since 1970, `prev` the SHA-256 of the line before, in hex.

    `actor` is the id of a key, `os:NAME` for whoever ran `bear keys`, or empty. `code` is a status name.
    `count` is above 1 where a line stands for more calls than one: refused ones.
    """

    action: str
    actor: str = ""
    tenant: str = ""
    peer: str = ""
    subjects: tuple[str, ...] = ()
    code: str = "OK"
    reason: str = ""
    duration_s: float = 0.0
    count: int = 1
    time_s: float = 0.0
    prev: str = ""


class Checked(msgspec.Struct, frozen=True):
    """What stands in a log: the number of its lines, the hash of the last, and where it is broken."""

    line_count: int
    last_hash: str
    problems: tuple[str, ...]


def append(state_dir: Path, entry: Entry) -> None:
    """Adds the entry with the time and the chain filled in; blocks. Raises OSError.

    Several processes may do so at the same time.
    """
    make_folder(state_dir)
    fd = open_private(state_dir / FILE, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{FILE} is no file")
        fcntl.flock(fd, fcntl.LOCK_EX)
        last, is_whole = _last_line(fd)
        made = msgspec.structs.replace(entry, time_s=round(time.time(), 3), prev=_hash_after(last))
        # What a crash left of a line stays, as a line of its own that the check shows.
        line = (b"" if is_whole else b"\n") + msgspec.json.encode(made) + b"\n"
        while line:
            line = line[os.write(fd, line) :]
        os.fsync(fd)
    finally:
        os.close(fd)  # and gives the lock back


def lines(state_dir: Path) -> list[bytes]:
    """The lines of the log, oldest first; none if there is no log. Raises OSError."""
    try:
        with (state_dir / FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def entry_of(line: bytes) -> Entry | None:
    """What a line says, None if it is damaged."""
    try:
        return msgspec.json.decode(line, type=Entry)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def check(found: list[bytes]) -> Checked:
    """Whether each line follows from the one before. Lines cut off the end are not to be seen in this."""
    problems = []
    expected = _FIRST
    for number, line in enumerate(found, 1):
        entry = entry_of(line)
        if entry is None:
            problems.append(f"line {number} is damaged")
        elif entry.prev != expected:
            where = "lines before it are missing" if number == 1 else f"line {number - 1} was changed"
            problems.append(f"line {number} does not follow: {where}, or lines were removed or moved")
        expected = _hash_after(line)
    return Checked(len(found), expected, tuple(problems))


def _hash_after(line: bytes | None) -> str:
    return _FIRST if line is None else hashlib.sha256(line).hexdigest()


def _last_line(fd: int) -> tuple[bytes | None, bool]:
    """The last line, None if there is none, and whether it has its end."""
    end = os.fstat(fd).st_size
    if end == 0:
        return None, True
    tail, start = b"", end
    while start > 0 and b"\n" not in tail[:-1]:
        size = min(_BLOCK, start)
        start -= size
        tail = os.pread(fd, size, start) + tail
    is_whole = tail.endswith(b"\n")
    return (tail[:-1] if is_whole else tail).rpartition(b"\n")[2], is_whole
