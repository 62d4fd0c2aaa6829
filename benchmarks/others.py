"""What the rest of the machine computes while something is measured.

All that the kernel counted as busy, less what this process and its descendants used. Two threads that wait
for each other at every step, as llama.cpp's do, lose not a part but most of their speed to a busy neighbour.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

# More than so much of a core, and a figure says more of the neighbour than of us.
QUIET_CORES = 0.1


class Others:
    """Watches from its making on. Tells 0 where the system does not tell."""

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._time_s = _busy_s(), _own_s(), time.monotonic()

    def cores(self) -> float:
        """Cores that others kept busy since, on average."""
        seconds = time.monotonic() - self._time_s
        used = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return max(0.0, used / seconds) if seconds else 0.0


def wait_until_quiet(timeout_s: float = 120.0, for_s: float = 1.0) -> None:
    """Returns when nobody else has computed for a while, or when that does not come about."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        watch = Others()
        time.sleep(for_s)
        if watch.cores() <= QUIET_CORES:
            return


def _busy_s() -> float:
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """CPU time of this process, of its descendants, and of those of them that have ended."""
    times = os.times()
    used = times.user + times.system + times.children_user + times.children_system
    parents = {pid: (parent, seconds) for pid, parent, seconds in _processes()}
    for pid, (parent, seconds) in parents.items():
        while parent in parents and parent != os.getpid():
            parent = parents[parent][0]
        if parent == os.getpid() and pid != parent:
            used += seconds
    return used


def _processes() -> Iterator[tuple[int, int, float]]:
    """Every process: its id, its parent's, and the CPU time of itself and of the children it waited for."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        yield int(folder.name), int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
