"""From nothing to READY, and the memory that it then takes, against llama-server.

Ours is LoadModel on a running server, the start of the worker process included; the peer's is from its start
to /health saying so, as it loads at its start only. Both get one sequence of the same context length; the
file is in the page cache, and our server has computed its checksum and, in a first load, measured step times.
What that first load takes is told beside it. Memory is read after a short generation.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bear_grpc.client import Client
from bear_grpc.config import available_cores
from benchmarks import models, peer, procfs, servers, stream
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Row, Series, at_most
from tools.progress import status

NAME = "load"
MODEL = "tinyllama"
CONTEXT = 2048
TOKENS = 16


@dataclass(frozen=True)
class Load:
    """One start: seconds, and bytes after a short generation."""

    seconds: float
    rss_bytes: int
    first_s: float = 0.0


def run(plan: Plan) -> Iterator[Row]:
    file = models.get(MODEL)
    program = peer.get().server
    threads = available_cores()
    _read(file)
    ours: list[Load] = []
    theirs: list[Load] = []
    rounds = plan.rounds_of(5, 1)
    with status(f"{NAME}: {rounds} rounds") as line:
        for index in range(rounds):
            line.update(f"round {index + 1}, ours")
            ours.append(plan.undisturbed(lambda: _ours(file, threads)))
            line.update(f"round {index + 1}, llama-server")
            theirs.append(plan.undisturbed(lambda: _llama_server(program, file, threads)))
    return _rows(ours, theirs)


def _rows(ours: list[Load], theirs: list[Load]) -> Iterator[Row]:
    seconds, peer_seconds = (Series([load.seconds for load in loads]) for loads in (ours, theirs))
    memory, peer_memory = (Series([load.rss_bytes / 1e6 for load in loads]) for loads in (ours, theirs))
    allowed = max(1.05 * peer_seconds.median, peer_seconds.median + 0.3)
    limit = at_most(seconds, allowed, "≤ 1.05 x or + 0.3 s")
    note = "repacked weights, not the first load"
    yield Row(NAME, "LoadModel to READY", "s", seconds, "llama-server", peer_seconds, limit, note)
    yield Row(NAME, "the first LoadModel of a model", "s", Series([load.first_s for load in ours]))
    limit = at_most(memory, peer_memory.median + 120, "≤ 1.0 x + 120 MB")
    yield Row(NAME, "resident, server and worker", "MB", memory, "llama-server", peer_memory, limit)


def _read(file: Path) -> None:
    """Brings the file into the page cache."""
    with file.open("rb", buffering=0) as stream_:
        while stream_.read(1 << 24):
            pass


def _ours(file: Path, threads: int) -> Load:
    with servers.bear("--allow-path", str(file.parent)) as server:
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            servers.register(client, MODEL, file)
            first_s = _load(client, threads)
            client.unload_model(MODEL)
            seconds = _load(client, threads)
        stream.measure(server.target, MODEL, TOKENS)
        pids = (server.pid, server.worker_pid(MODEL))
        return Load(seconds, sum(procfs.usage(pid).rss_bytes for pid in pids), first_s)


def _load(client: Client, threads: int) -> float:
    began = time.perf_counter()
    client.load_model(MODEL, threads=threads, context_length=CONTEXT, max_sequences=1, repack=True)
    return time.perf_counter() - began


def _llama_server(program: Path, file: Path, threads: int) -> Load:
    arguments = ("--ctx-size", str(CONTEXT), "--parallel", "1", "--threads", str(threads))
    with servers.llama_server(program, file, arguments) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({"prompt": "a", "n_predict": TOKENS, "temperature": 0, "ignore_eos": True})
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status != http.client.OK:
            raise SetupError(f"llama-server answered {answer.status}")
        return Load(server.ready_s, procfs.usage(server.pid).rss_bytes)
