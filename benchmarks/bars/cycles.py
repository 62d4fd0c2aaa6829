"""Loading and unloading a small model, a hundred times: what grows, and what is left behind.

`tests/slow/test_cycles.py` runs a part of this as a test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bear_grpc.client import Client
from benchmarks import models, procfs, servers
from benchmarks.measure import Plan, Row, Series, at_most
from tools.progress import status

NAME = "cycles"
MODEL = "micro"
# The first ones make what is kept: threads, pools, tables of step times.
WARM_UP = 5
GROWTH_BYTES = 5_000_000
LEDGER_PERCENT = 5.0


@dataclass
class Cycles:
    """What was seen after each unload; `ledger_percent` is how far the ledger was from the system's count."""

    server: list[procfs.Usage] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    ledger_percent: list[float] = field(default_factory=list)
    is_file_touched: bool = False

    @property
    def growth(self) -> int:
        """Bytes of the largest size over the first."""
        sizes = [usage.rss_bytes for usage in self.server]
        return max(sizes) - sizes[0]

    @property
    def more_files(self) -> int:
        """Open files and sockets of the last one over the first."""
        return self.server[-1].open_files - self.server[0].open_files


def run(plan: Plan) -> Iterator[Row]:
    count = plan.count(100, 10)
    with status(f"{NAME}: {count} loads") as line:
        seen = cycles(models.get(MODEL), count, lambda done: line.update(f"[{done}/{count}]"))
    growth = Series([seen.growth / 1e6])
    size = f"{seen.server[-1].rss_bytes / 1e6:.1f} MB at the end"
    yield Row(NAME, "growth of the server", "MB", growth, limit=at_most(growth, 5), notes=size)
    files = Series([seen.more_files])
    yield Row(NAME, "more open files and sockets", "", files, limit=at_most(files, 0))
    processes = Series([max(seen.children)])
    yield Row(NAME, "processes left", "", processes, limit=at_most(processes, 0))
    ledger = Series([max(seen.ledger_percent)])
    yield Row(NAME, "memory ledger off by", "%", ledger, limit=at_most(ledger, LEDGER_PERCENT))
    touched = Series([float(seen.is_file_touched)])
    yield Row(NAME, "the model's file changed", "", touched, limit=at_most(touched, 0))


def cycles(file: Path, count: int, tell: Callable[[int], None] = lambda done: None) -> Cycles:
    """Loads and unloads so often, on a server of its own; the first WARM_UP times are not looked at."""
    seen = Cycles()
    before = _fingerprint(file)
    with servers.bear("--allow-path", str(file.parent)) as server:
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            servers.register(client, "model", file)
            for done in range(1, WARM_UP + count + 1):
                client.load_model("model")
                found = client.get_model_status("model").status
                used = procfs.pss_bytes(found.worker_process_id)
                client.unload_model("model")
                if done > WARM_UP:
                    seen.server.append(procfs.settled_usage(server.pid))
                    seen.children.append(len(procfs.children(server.pid)))
                    seen.ledger_percent.append(abs(found.memory.process_bytes - used) / used * 100)
                    tell(done - WARM_UP)
    seen.is_file_touched = _fingerprint(file) != before
    return seen


def _fingerprint(file: Path) -> tuple[object, ...]:
    found = file.stat()
    with file.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest(),
            found.st_mtime_ns,
            found.st_mode,
            found.st_nlink,
            found.st_ino,
        )
