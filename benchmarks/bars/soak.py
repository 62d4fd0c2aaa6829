"""Thousands of generations in a row: what grows, and what is left behind.

`tests/slow/test_soak.py` runs a part of this as a test.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from bear_grpc.client import Client
from bear_grpc.v1.types_pb2 import ModelStatus
from benchmarks import procfs, servers
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Row, Series, at_most
from tools.progress import status

NAME = "soak"
MODEL = "bear-demo"
CLIENTS = 4
TOKENS = 32
GROWTH_BYTES = 5_000_000
QUIET_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Sample:
    """Both processes after a number of generations."""

    generations: int
    server: procfs.Usage
    worker: procfs.Usage
    # A cache that the worker accounts for: it fills up to its bound, and is no leak.
    snapshot_bytes: int


@dataclass
class Soak:
    """What was seen. The first sample is the one that the others are held against."""

    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    status: ModelStatus = field(default_factory=ModelStatus)

    def growth(self, of: Callable[[Sample], int]) -> int:
        """Bytes of the largest sample over the first."""
        sizes = [of(sample) for sample in self.samples]
        return max(sizes) - sizes[0]

    def more(self, of: Callable[[Sample], procfs.Usage], what: str) -> int:
        """Open files or threads of the last sample over the first."""
        first, last = of(self.samples[0]), of(self.samples[-1])
        return int(getattr(last, what) - getattr(first, what))


def run(plan: Plan) -> Iterator[Row]:
    total = plan.count(5000, 250)
    warm_up = total // 10
    with status(f"{NAME}: {total} generations") as line:
        seen = soak(total, warm_up, total // 50, lambda done: line.update(f"[{done}/{total}]"))
    note = f"from {warm_up} to {total} generations"
    snapshots = f", {seen.samples[-1].snapshot_bytes / 1e6:.1f} MB of it snapshots, which do not count"
    for process, of, memory, known in (
        ("server", of_server, server_bytes, ""),
        ("worker", of_worker, worker_bytes, snapshots),
    ):
        growth = Series([seen.growth(memory) / 1e6])
        size = f"; {of(seen.samples[-1]).rss_bytes / 1e6:.1f} MB at the end{known}"
        yield Row(NAME, f"growth of the {process}", "MB", growth, limit=at_most(growth, 5), notes=note + size)
        files = Series([seen.more(of, "open_files")])
        yield Row(NAME, f"more open files, {process}", "", files, limit=at_most(files, 0))
        threads = Series([seen.more(of, "threads")])
        yield Row(NAME, f"more threads, {process}", "", threads, limit=at_most(threads, 0))
    left = Series([seen.status.running_count + seen.status.waiting_count])
    yield Row(NAME, "requests left", "", left, limit=at_most(left, 0))
    cells = Series([servers.held_tokens(seen.status)])
    yield Row(NAME, "tokens held in the KV cache", "", cells, limit=at_most(cells, 0))
    yield Row(NAME, "speed", "tok/s", Series([seen.tokens / seen.seconds]))


def of_server(sample: Sample) -> procfs.Usage:
    return sample.server


def of_worker(sample: Sample) -> procfs.Usage:
    return sample.worker


def server_bytes(sample: Sample) -> int:
    return sample.server.rss_bytes


def worker_bytes(sample: Sample) -> int:
    """What the worker has in memory but the snapshots that it tells of."""
    return sample.worker.rss_bytes - sample.snapshot_bytes


def soak(total: int, warm_up: int, every: int, tell: Callable[[int], None] = lambda done: None) -> Soak:
    """Runs `total` generations on a server of its own; samples after `warm_up`, then `every` so many.

    Raises:
        SetupError: a generation did not bring what was asked for, or one does not end.
    """
    seen = Soak()
    with servers.bear("--load", MODEL) as server, ExitStack() as opened:
        servers.wait_until_serving(server)
        worker = server.worker_pid(MODEL)
        clients = [opened.enter_context(Client(server.target)) for _ in range(CLIENTS)]

        def sample(done: int) -> Sample:
            snapshots = clients[0].get_model_status(MODEL).status.snapshot_bytes
            return Sample(done, procfs.settled_usage(server.pid), procfs.usage(worker), snapshots)

        began = time.perf_counter()
        for done, client in enumerate(itertools.islice(itertools.cycle(clients), total), 1):
            seen.tokens += _generate(client, done)
            if done >= warm_up and (done - warm_up) % every == 0:
                seen.samples.append(sample(done))
                tell(done)
        seen.seconds = time.perf_counter() - began
        seen.status = _quiet(clients[0])
        seen.samples.append(sample(total))
    return seen


def _generate(client: Client, number: int) -> int:
    prompt = f"Question {number}: what is a bear?"
    produced = 0
    for event in client.generate(MODEL, prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True):
        if event.HasField("completed"):
            produced = event.completed.usage.completion_token_count
    if produced != TOKENS:
        raise SetupError(f"generation {number} brought {produced} tokens, not {TOKENS}")
    return produced


def _quiet(client: Client) -> ModelStatus:
    """The model's status once nothing is under way."""
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while True:
        found = client.get_model_status(MODEL).status
        if not found.running_count and not found.waiting_count:
            return found
        if time.monotonic() > deadline:
            left = f"{found.running_count} running, {found.waiting_count} waiting"
            raise SetupError(f"after the last answer: {left}")
        time.sleep(0.05)
