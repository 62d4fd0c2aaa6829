"""One stream of a confined worker against one of a worker that is not: what the sandbox costs.

Two of our servers, asked in turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bear_grpc.client import Client
from bear_grpc.v1.server_service_pb2 import SANDBOX_STATE_ON
from benchmarks import models, servers, stream
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Result, Row, Series, at_least
from tools.progress import status

NAME = "sandbox"
OFF = "sandbox off"
RATIO = 0.98
TOKENS = {"micro": 400, "tinyllama": 48}


def run(plan: Plan) -> Iterator[Result]:
    for model in ("micro", plan.model("tinyllama")):
        tokens = plan.count(TOKENS.get(model, 64), 64)
        yield _row(model, tokens, _measure(plan, model, tokens))


def _measure(plan: Plan, model: str, tokens: int) -> tuple[Series, Series]:
    """Tokens per second with and without."""
    folder = str(models.get(model).parent)
    rounds = plan.rounds_of(9, 1)
    with (
        servers.bear("--allow-path", folder, "--sandbox", "require") as confined,
        servers.bear("--allow-path", folder, "--sandbox", "off") as free,
        status(f"{NAME}, {model}: {rounds} rounds") as line,
    ):
        repack = None
        for server in (confined, free):
            # What is measured at a load may choose differently: the second takes what the first has.
            repack = _load(plan, server, model, repack)
        _check(confined)
        found: dict[str, list[float]] = {confined.target: [], free.target: []}
        for index in range(rounds):
            line.update(f"round {index + 1}")
            order = (confined, free) if index % 2 else (free, confined)
            for server in order:
                reading = plan.undisturbed(partial(stream.measure, server.target, model, tokens))
                found[server.target].append(reading.tokens_per_second)
    return Series(found[confined.target]), Series(found[free.target])


def _load(plan: Plan, server: servers.Bear, model: str, repack: bool | None) -> bool:
    servers.wait_until_serving(server)
    with Client(server.target) as client:
        servers.register(client, model, models.get(model))
        plan.settle()
        client.load_model(model, repack=repack)
        chosen = client.get_model_status(model).status.effective_options.repack
    stream.measure(server.target, model, 16)
    return chosen


def _check(server: servers.Bear) -> None:
    with Client(server.target) as client:
        info = client.server_info()
    if info.sandbox != SANDBOX_STATE_ON:
        raise SetupError(f"the sandbox is not on: {info.sandbox_detail}")


def _row(model: str, tokens: int, found: tuple[Series, Series]) -> Row:
    on, off = found
    limit = at_least(on, off, RATIO)
    return Row(NAME, f"one stream, {model}", "tok/s", on, OFF, off, limit, f"{tokens} tokens")
