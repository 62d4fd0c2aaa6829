"""What the kernel tells of a process: its memory, open files and threads. Linux only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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


def _rss_bytes(proc: Path) -> int:
    # The sums of `status` lag behind by some pages per thread, these do not.
    for line in (proc / "smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc} tells no memory")
