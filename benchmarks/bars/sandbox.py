"""One stream of a confined worker against one of a worker that is not: what the sandbox costs.

Two of our servers, asked in turn, so that a machine that slows down slows both. What a worker computes for a
token is told too: neighbours that take its cores change that by less than its speed. On a busy machine
(`--at-once`) it has one thread, as two would compute while they wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from bear_grpc.client import Client
from bear_grpc.v1.server_service_pb2 import SANDBOX_STATE_ON
from benchmarks import models, procfs, servers, stream
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Result, Row, Series, at_least, at_most_of
from tools.progress import status

NAME = "sandbox"
OFF = "sandbox off"
RATIO, COST_RATIO = 0.98, 1.02
TOKENS = {"micro": 400, "tinyllama": 48}


@dataclass
class Side:
    """One of the two servers, and what was seen of its worker: tokens per second, CPU ms per token."""

    server: servers.Bear
    worker: int
    speed: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)

    def read(self, model: str, tokens: int) -> tuple[float, float]:
        before_s = procfs.cpu_s(self.worker)
        reading = stream.measure(self.server.target, model, tokens)
        return reading.tokens_per_second, 1000 * (procfs.cpu_s(self.worker) - before_s) / tokens


def run(plan: Plan) -> Iterator[Result]:
    for model in ("micro", plan.model("tinyllama")):
        tokens = plan.count(TOKENS.get(model, 64), 64)
        on, off = _measure(plan, model, tokens)
        speeds, costs = (Series(on.speed), Series(off.speed)), (Series(on.cost), Series(off.cost))
        what = f"one stream, {model}"
        note = f"{tokens} tokens" + (", 1 thread" if plan.at_once else "")
        limit = at_least(*speeds, RATIO)
        yield Row(NAME, what, "tok/s", speeds[0], OFF, speeds[1], limit, note)
        limit = at_most_of(*costs, COST_RATIO)
        yield Row(NAME, f"{what}, computed", "ms/token", costs[0], OFF, costs[1], limit)


def _measure(plan: Plan, model: str, tokens: int) -> tuple[Side, Side]:
    """With and without."""
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
        on, off = (Side(server, server.worker_pid(model)) for server in (confined, free))
        for index in range(rounds):
            line.update(f"round {index + 1}")
            for side in (on, off) if index % 2 else (off, on):
                speed, cost = plan.undisturbed(partial(side.read, model, tokens))
                side.speed.append(speed)
                side.cost.append(cost)
    return on, off


def _load(plan: Plan, server: servers.Bear, model: str, repack: bool | None) -> bool:
    servers.wait_until_serving(server)
    with Client(server.target) as client:
        servers.register(client, model, models.get(model))
        plan.settle()
        client.load_model(model, repack=repack, threads=1 if plan.at_once else None)
        chosen = client.get_model_status(model).status.effective_options.repack
    stream.measure(server.target, model, 16)
    return chosen


def _check(server: servers.Bear) -> None:
    with Client(server.target) as client:
        info = client.server_info()
    if info.sandbox != SANDBOX_STATE_ON:
        raise SetupError(f"the sandbox is not on: {info.sandbox_detail}")
