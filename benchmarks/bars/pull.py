"""A download from nginx on loopback against `curl | sha256sum`, and generating while one goes on.

Ours writes the file, checks it and registers it; the peer throws the bytes away. Generating is measured
beside a download that is held to 100 MB/s, against generating with nothing beside it, on one server.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bear_grpc.client import Client
from benchmarks import models, nginx, servers
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Row, Series, at_least, at_most
from tools.progress import status

NAME = "pull"
RATE_MB_S = 100
PROMPT_TOKENS = 64
ASKS = 12


def run(plan: Plan) -> Iterator[Row]:
    file = models.get(plan.model("tinyllama"))
    rounds = plan.rounds_of(5, 1)
    ours: list[float] = []
    curl: list[float] = []
    with status(f"{NAME}: {rounds} rounds") as line, nginx.serving(file) as site:
        for index in range(rounds):
            line.update(f"round {index + 1}, bear pull")
            ours.append(site.size_bytes / 1e6 / plan.undisturbed(lambda: _pull(site)))
            line.update(f"round {index + 1}, curl | sha256sum")
            curl.append(site.size_bytes / 1e6 / plan.undisturbed(lambda: _curl(site)))
        line.update("first tokens beside a download")
        beside, alone = _first_tokens(site, file, plan.count(ASKS, 3))
    rate, peer_rate = Series(ours), Series(curl)
    yield Row(
        NAME, "verified download", "MB/s", rate, "curl | sha256sum", peer_rate, at_least(rate, peer_rate, 0.8)
    )
    slower = at_most(beside, 1.3 * alone.median, "≤ 1.3 x")
    note = f"prompt of {PROMPT_TOKENS}, download held to {RATE_MB_S} MB/s"
    yield Row(NAME, "first token beside a download", "ms", beside, "without one", alone, slower, note)


def _settings(folder: Path, site: nginx.Site, rate_mb_s: float = 0.0) -> tuple[str, str]:
    file = folder / "bear.toml"
    file.write_text(f'hub_endpoint = "{site.endpoint}"\npull_rate_limit_mb_s = {rate_mb_s}\n')
    return "--config", str(file)


def _pull(site: nginx.Site) -> float:
    with (
        tempfile.TemporaryDirectory(prefix="bear-") as folder,
        servers.bear(*_settings(Path(folder), site)) as server,
    ):
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            began = time.perf_counter()
            _download(client, site)
            return time.perf_counter() - began


def _download(client: Client, site: nginx.Site) -> None:
    """Reads the steps of a download to its end. Raises SetupError if that is not the model."""
    last = None
    for step in client.pull_model(site.reference):
        last = step
    if last is None or last.completed.model.sha256 != site.sha256:
        raise SetupError("the download did not end with the model")


def _curl(site: nginx.Site) -> float:
    began = time.perf_counter()
    command = f"curl -sS {shlex.quote(site.url)} | sha256sum"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    if not done.stdout.startswith(site.sha256):
        raise SetupError("curl brought other bytes")
    return seconds


def _first_tokens(site: nginx.Site, file: Path, count: int) -> tuple[Series, Series]:
    """Milliseconds to the first token beside downloads, and with nothing beside."""
    beside: list[float] = []
    alone: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="bear-") as folder,
        servers.bear(*_settings(Path(folder), site, RATE_MB_S), "--allow-path", str(file.parent)) as server,
    ):
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            servers.register(client, "model", file)
            client.load_model("model")
            _first_token(client, 0)
            for index in range(count):
                alone.append(_first_token(client, index))
                _begin(client, site)
                beside.append(_first_token(client, index))
                if not client.get_model_status(site.reference).status.HasField("pull"):
                    raise SetupError("the download ended before the first token")
                client.cancel_pull(site.reference)
                client.prune_models()
    return Series(beside), Series(alone)


def _begin(client: Client, site: nginx.Site) -> None:
    """Returns when bytes of a download come; leaving the stream does not end it."""
    for step in client.pull_model(site.reference):
        if step.progress.completed_bytes:
            return
    raise SetupError("the download ended at once")


def _first_token(client: Client, salt: int) -> float:
    """Of a prompt that shares nothing with another."""
    prompt = [
        3 + (salt * 7919 + place * 104729 + time.perf_counter_ns()) % 30000 for place in range(PROMPT_TOKENS)
    ]
    began = time.perf_counter()
    for event in client.generate("model", token_ids=prompt, max_tokens=2, ignore_eos=True, temperature=0.0):
        if event.HasField("delta"):
            return (time.perf_counter() - began) * 1e3
    return (time.perf_counter() - began) * 1e3
