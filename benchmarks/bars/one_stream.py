"""One stream, end to end: tokens per second at a client over gRPC, against llama.cpp alone.

Four programs in turn, round after round, so that a machine that slows down slows all of them: our server
with its client, the bare loop in Python, llama-bench, and llama-server with a client, which is told but not
judged. Same model, threads and flash attention. The layout of weights is what our server takes by itself;
only llama-server runs at its default.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bear_grpc.client import Client
from bear_grpc.config import available_cores
from benchmarks import loops, models, peer, servers, sides, stream
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Row, Series, at_least
from tools.progress import status

NAME = "one-stream"
MODEL = "tinyllama"


@dataclass
class Figures:
    """What each program gave in each round; the loops in tokens per second."""

    ours: list[stream.Reading] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    bench: list[float] = field(default_factory=list)
    server: list[stream.Reading] = field(default_factory=list)


def run(plan: Plan) -> Iterator[Row]:
    file = models.get(MODEL)
    programs = peer.get()
    threads = available_cores()
    tokens = plan.count(128, 48)
    rounds = plan.rounds_of(5, 1)
    found = Figures()
    arguments = ("--threads", str(threads), "--parallel", "1", "--ctx-size", "2048")
    # Both servers stay: an idle one costs nothing, and the first request of a process is not a typical one.
    with (
        servers.bear("--allow-path", str(file.parent)) as server,
        servers.llama_server(programs.server, file, arguments) as other,
        status(f"{NAME}: {rounds} rounds") as line,
    ):
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            servers.register(client, MODEL, file)
            plan.settle()
            client.load_model(MODEL, threads=threads)
            repack = client.get_model_status(MODEL).status.effective_options.repack
        targets = (server.target, f"http://127.0.0.1:{other.port}")
        for target in targets:
            stream.measure(target, MODEL, 16)
        for index in range(rounds):
            line.update(f"round {index + 1}")
            found.ours.append(plan.undisturbed(lambda: stream.measure(targets[0], MODEL, tokens)))
            found.bare.append(plan.undisturbed(lambda: loops.measure(file, tokens, threads, repack=repack)))
            found.bench.append(
                plan.undisturbed(lambda: _llama_bench(programs.bench, file, tokens, threads, repack))
            )
            found.server.append(plan.undisturbed(lambda: stream.measure(targets[1], MODEL, tokens)))
    return _rows(found, sides.layout(repack))


def _rows(found: Figures, layout: str) -> Iterator[Row]:
    ours, server = (_rates(readings) for readings in (found.ours, found.server))
    bare, bench = Series(found.bare), Series(found.bench)
    note = (
        f"{layout}, {found.ours[0].tokens} tokens in {min(reading.deltas for reading in found.ours)} deltas"
    )
    yield Row(NAME, "end to end", "tok/s", ours, "llama-bench", bench, at_least(ours, bench, 0.97), note)
    yield Row(NAME, "end to end", "tok/s", ours, "bare loop", bare)
    yield Row(NAME, "bare loop", "tok/s", bare, "llama-bench", bench)
    yield Row(NAME, "end to end", "tok/s", ours, "llama-server", server, notes="at its default; aim 1.0 x")
    inside = Series([reading.server_tokens_per_second for reading in found.ours])
    yield Row(NAME, "as the server counts", "tok/s", inside, "llama-bench", bench)
    first, peer_first = (
        Series([reading.ttft_s * 1000 for reading in readings]) for readings in (found.ours, found.server)
    )
    yield Row(NAME, "first token, prompt of 1", "ms", first, "llama-server", peer_first)


def _rates(readings: list[stream.Reading]) -> Series:
    return Series([reading.tokens_per_second for reading in readings])


def _llama_bench(program: Path, file: Path, tokens: int, threads: int, repack: bool) -> float:
    command: list[str | Path] = [program, "--model", file, "--threads", str(threads)]
    command += ["--repack", str(int(repack))]
    command += ["--n-prompt", "0", "--n-gen", str(tokens), "--repetitions", "1", "--flash-attn", "auto"]
    command += ["--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"llama-bench ended with {done.returncode}: {done.stderr[-500:]}")
    [result] = json.loads(done.stdout)
    return float(result["avg_ts"])
