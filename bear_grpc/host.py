"""What this process may use of the machine's memory."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Where the system tells nothing: enough for a small model, too little to be careless.
UNKNOWN_FREE_BYTES = 4 * 2**30


def free_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Memory that can be had without swapping, within the limit of the control group."""
    found = [size for size in (_available(meminfo), _within_cgroup(cgroup)) if size is not None]
    return max(0, min(found)) if found else UNKNOWN_FREE_BYTES


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _within_cgroup(cgroup: Path) -> int | None:
    """Version 2 only: its files name the limit of this process's own group inside a container."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        return None if limit == "max" else int(limit) - used
    except (OSError, ValueError):
        return None
