"""What production costs: tokens/s with keys, quotas, metrics and logs against none; the time of a scrape.

Two of our servers, asked in turn; the one with metrics is scraped every second meanwhile. A scrape is timed
with ten models and a thousand streams: with their workers halted, for the server's own time, and right
after that, when these compute on all cores.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial

from bear_grpc.client import Client
from benchmarks import crowd, models, servers
from benchmarks.asks import Ask, Prompts, rate
from benchmarks.cache import SetupError
from benchmarks.measure import Limit, Plan, Result, Row, Series, at_least
from tools.progress import status

NAME = "telemetry"
OFF = "all off"
RATIO = 0.98
STREAMS = {"micro": 16, "tinyllama": 1}
TOKENS = {"micro": 384, "tinyllama": 96}
PROMPT, CONTEXT = 16, 512
SCRAPE_EVERY_S = 1.0
LIMIT_MS = 20.0
MODELS, SLOTS = 10, 16
CROWD, CROWD_TOKENS = 1000, 48
SCRAPES = 50
PATIENCE_S = 120.0
NOTHING = {"BEAR_LOG_FILE": "false", "BEAR_LOG_LEVEL": "ERROR"}


def run(plan: Plan) -> Iterator[Result]:
    for model in ("micro", plan.model("tinyllama")):
        yield _rates(plan, model)
    yield from _scrapes(plan)


def _rates(plan: Plan, model: str) -> Row:
    streams, tokens = STREAMS.get(model, 1), plan.count(TOKENS.get(model, 96), 48)
    folder = str(models.get(model).parent)
    rounds = plan.rounds_of(9, 1)
    with (
        servers.equipped("--allow-path", folder) as full,
        servers.bear("--allow-path", folder, settings=NOTHING) as bare,
        status(f"{NAME}, {model}: {rounds} rounds") as line,
    ):
        repack = None
        for server in (full, bare):
            # What is measured at a load may choose differently: the second takes what the first has.
            repack = _load(plan, server, model, repack, streams)
        found: dict[str, list[float]] = {full.target: [], bare.target: []}
        for index in range(rounds):
            line.update(f"round {index + 1}")
            order = (full, bare) if index % 2 else (bare, full)
            for server in order:
                attempt = partial(_rate, server, model, streams, tokens, index)
                with _scraping(full.metrics) if server is full else contextlib.nullcontext():
                    found[server.target].append(plan.undisturbed(attempt))
    on, off = Series(found[full.target]), Series(found[bare.target])
    what = f"{streams} streams, {model}" if streams > 1 else f"one stream, {model}"
    return Row(NAME, what, "tok/s", on, OFF, off, at_least(on, off, RATIO), f"{tokens} tokens each")


def _rate(server: servers.Bear, model: str, streams: int, tokens: int, index: int) -> float:
    prompts = Prompts(index, tokens)
    asks = [Ask(prompts.take(PROMPT), tokens, model) for _ in range(streams)]
    return rate(crowd.play(server.target, asks, key=server.key, may_be_silent=True))


def _load(plan: Plan, server: servers.Bear, model: str, repack: bool | None, streams: int) -> bool:
    servers.wait_until_serving(server)
    with server.client() as client:
        servers.register(client, model, models.get(model))
        plan.settle()
        client.load_model(model, repack=repack, max_sequences=streams, context_length=CONTEXT)
        chosen = client.get_model_status(model).status.effective_options.repack
    _rate(server, model, streams, 16, 0)
    return chosen


def _scrapes(plan: Plan) -> Iterator[Row]:
    count, streams = plan.count(MODELS, 2), plan.count(CROWD, 40)
    names = [f"micro-{number}" for number in range(count)]
    file, address = models.get("micro"), f"127.0.0.1:{servers.free_port()}"
    settings = {
        "BEAR_METRICS_LISTEN": address,
        # Workers are halted, and nobody may take them for dead.
        "BEAR_HEARTBEAT_TIMEOUT_S": "600",
        "BEAR_STALL_TIMEOUT_S": "600",
    }
    with servers.bear("--allow-path", str(file.parent), settings=settings) as server:
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            for name in names:
                servers.register(client, name, file)
                client.load_model(name, max_sequences=SLOTS, context_length=CONTEXT, threads=1)
        prompts = Prompts(0)
        # Every series is there before.
        crowd.play(server.target, [Ask(prompts.take(8), 4, name) for name in names], may_be_silent=True)
        asks = [Ask(prompts.take(8), CROWD_TOKENS, names[n % count]) for n in range(streams)]
        playing = threading.Thread(
            target=crowd.play, args=(server.target, asks), kwargs={"may_be_silent": True}
        )
        with _halted([server.worker_pid(name) for name in names]):
            playing.start()
            _wait_for(address, streams)
            time.sleep(1.0)  # what the clients still do is not the server's
            own = [_scrape_ms(address) for _ in range(plan.count(SCRAPES, 5))]
            size, open_streams = _size(address), _in_flight(address)
        busy = [_scrape_ms(address) for _ in range(5)]
        playing.join()
    if open_streams < streams:
        raise SetupError(f"only {open_streams} of {streams} streams were open")
    what = f"a scrape, {count} models, {open_streams} streams"
    series = Series(own)
    note = f"{size / 1000:.0f} kB, workers halted; all of {len(own)}"
    limit = Limit(f"< {LIMIT_MS:g} ms", max(own) < LIMIT_MS)
    yield Row(NAME, what, "ms", series, limit=limit, notes=note)
    yield Row(
        NAME, f"the same while {count} workers compute", "ms", Series(busy), notes="all cores are taken"
    )


@contextlib.contextmanager
def _halted(pids: Sequence[int]) -> Iterator[None]:
    """These processes get no time."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _scraping(address: str) -> Iterator[None]:
    """Somebody asks for the metrics again and again."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(SCRAPE_EVERY_S):
            _page(address)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield
    finally:
        ended.set()
        scraper.join()


def _wait_for(address: str, streams: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while _in_flight(address) < streams:
        if time.monotonic() > deadline:
            raise SetupError(f"{streams} streams do not come up")
        time.sleep(0.02)


def _in_flight(address: str) -> int:
    for line in _page(address).decode().splitlines():
        if line.startswith("bear_rpc_in_flight{") and 'method="Generate"' in line:
            return int(float(line.rpartition(" ")[2]))
    return 0


def _scrape_ms(address: str) -> float:
    began = time.perf_counter()
    _page(address)
    return (time.perf_counter() - began) * 1000


def _size(address: str) -> int:
    return len(_page(address))


def _page(address: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_S) as answer:
        return bytes(answer.read())
