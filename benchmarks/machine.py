"""What a figure depends on: the machine, the versions, and what else the machine was doing."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from bear_grpc.config import available_cores
from tools.llama_wheel import PACKAGE, cpu_identity


def describe() -> dict[str, str]:
    """The lines at the top of a report."""
    return {
        "machine": f"{cpu_identity()['model']}, {available_cores()} cores, {_memory_gib():.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "software": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)]
        ),
        "revision": _revision(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}".strip(),
    }


_PACKAGES = ("bear-grpc", PACKAGE, "grpcio")


def _memory_gib() -> float:
    try:
        fields = Path("/proc/meminfo").read_text().split()
    except OSError:
        return 0.0
    return int(fields[fields.index("MemTotal:") + 1]) / 2**20


def _revision() -> str:
    if not shutil.which("git"):
        return "unknown"
    command: list[str | Path] = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
