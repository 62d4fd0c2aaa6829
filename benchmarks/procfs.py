"""What the kernel tells of a process: its memory, open files and threads. Linux only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

READINGS, READING_S = 5, 0.02


@dataclass(frozen=True)
class Usage:
    """A process at one moment."""

    rss_bytes: int
    open_files: int
    threads: int


def usage(pid: int) -> Usage:
    """Raises OSError if the process is gone."""
    proc = Path(f"/proc/{pid}")
    open_files = sum(1 for _ in (proc / "fd").iterdir())
    return Usage(_rss_bytes(proc), open_files, sum(1 for _ in (proc / "task").iterdir()))


def settled_usage(pid: int) -> Usage:
    """With the fewest open files of some readings: the audit log is open while a line of it is written.

    Raises OSError if the process is gone.
    """
    return min((_later(pid) for _ in range(READINGS)), key=lambda found: found.open_files)


def _later(pid: int) -> Usage:
    time.sleep(READING_S)
    return usage(pid)


def pss_bytes(pid: int) -> int:
    """Its own pages, and its share of those that it has in common with others. Raises OSError."""
    return _bytes(Path(f"/proc/{pid}"), "Pss:")


def cpu_s(pid: int) -> float:
    """Seconds for which its threads have computed, those that have ended left out. Raises OSError."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def children(pid: int) -> list[int]:
    """Processes that it has started and that are still there."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _rss_bytes(proc: Path) -> int:
    return _bytes(proc, "Rss:")


def _bytes(proc: Path, what: str) -> int:
    # The sums of `status` lag behind by some pages per thread, these do not.
    for line in (proc / "smaps_rollup").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc} tells no memory")
