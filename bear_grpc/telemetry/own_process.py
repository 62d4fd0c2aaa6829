"""The server's own process, by the names that Prometheus' libraries give it."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import families
from .model_metrics import Value, grouped
from .series import Taken

_PROCESS = (
    families.PROCESS_CPU,
    families.PROCESS_MEMORY,
    families.PROCESS_FILES,
    families.PROCESS_START,
)


def own_process(start_time_s: float) -> list[Taken]:
    """Its CPU time, memory and files; Linux tells all of it. Blocking, but for microseconds."""
    return grouped(list(_values(start_time_s)), _PROCESS)


def start_time_s() -> float:
    """When this process began, in seconds since 1970."""
    return time.time() - time.clock_gettime(time.CLOCK_MONOTONIC) + _began_s()


def _began_s() -> float:
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.clock_gettime(time.CLOCK_MONOTONIC)


def _values(start_time_s: float) -> Iterator[Value]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield families.PROCESS_CPU, (), used.ru_utime + used.ru_stime
    yield families.PROCESS_START, (), start_time_s
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            yield families.PROCESS_MEMORY, (), pages * resource.getpagesize()
        with contextlib.suppress(OSError):
            yield families.PROCESS_FILES, (), len(os.listdir("/proc/self/fd"))
