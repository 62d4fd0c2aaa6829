"""A short request while another tenant has 100 long ones under way, against the same beside one long request.

One client's requests come over TCP and those of the other over a unix socket: without keys that makes two
tenants. llama-server, which knows no tenants, gets the same asks; a client waits for PATIENCE_S at most.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
from collections.abc import Iterator
from functools import partial

from bear_grpc.client import Client
from benchmarks import crowd, models, servers, sides
from benchmarks.asks import Answer, Ask, Prompts
from benchmarks.measure import Curve, Plan, Result, Row, Series, at_most_of
from benchmarks.sides import PEER, Side
from tools.progress import status

NAME = "fairness"
PICTURE = "fairness"
SLOTS = 16
CONTEXT = 512
LONG = (64, 440)  # tokens of a prompt, and after it
SHORT = (32, 32)
SHORT_ONES = 3
BEGUN_TOKENS, SETTLE_S = 4, 2.0
PATIENCE_S = 40.0
FEW, MANY = 1, 100
RATIO = 2.0


def run(plan: Plan) -> Iterator[Result]:
    model, rounds = plan.model("tinyllama"), plan.rounds_of(3, 1)
    counts = (FEW, MANY) if plan.quick else (FEW, 4, SLOTS, MANY)
    with (
        ours(plan, model) as (side, other),
        sides.theirs(model, sequences=SLOTS, context=CONTEXT) as peer,
        status(f"{NAME}: {rounds} rounds") as line,
    ):
        sides.warm_up([side, peer])
        found: dict[tuple[str, int], list[float]] = {}
        for index in range(rounds):
            for count in counts:
                for each, heavy in ((side, other), (peer, peer.target)):
                    line.update(f"round {index + 1}, {each.name or 'ours'} beside {count}")
                    attempt = partial(measure, each, heavy, count, Prompts(index, count))
                    found.setdefault((each.name, count), []).append(plan.undisturbed(attempt))
    yield from _rows({key: Series(values) for key, values in found.items()}, model)
    for name in ("", PEER):
        points = [(float(count), Series(found[name, count]).median) for count in counts]
        yield Curve(PICTURE, name or "bear_grpc", points)


@contextlib.contextmanager
def ours(plan: Plan, model: str) -> Iterator[tuple[Side, str]]:
    """Our server, and where its other tenant connects to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    file = models.get(model)
    with servers.bear("--allow-path", str(file.parent), "--listen", address) as server:
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            servers.register(client, model, file)
            plan.settle()
            client.load_model(model, max_sequences=SLOTS, context_length=CONTEXT)
        yield Side("", server.target, model, True), address


def measure(side: Side, heavy: str, count: int, prompts: Prompts) -> float:
    """Seconds of a short request, the median of some that come one after the other."""
    last = count + SHORT_ONES - 1
    asks = [
        Ask(prompts.take(LONG[0]), LONG[1], side.model, cancel_with=last, target=heavy) for _ in range(count)
    ]
    for place in range(SHORT_ONES):
        after, begun = ([count + place - 1], None) if place else ([0], BEGUN_TOKENS)
        delay_s = 0.0 if place else SETTLE_S
        prompt = prompts.take(SHORT[0])
        asks.append(Ask(prompt, SHORT[1], side.model, after, begun, delay_s, cancel_s=PATIENCE_S))
    return statistics.median(map(_seconds, crowd.play(side.target, asks)[count:]))


def _seconds(answer: Answer) -> float:
    return answer.ended_s - answer.asked_s


def _rows(found: dict[tuple[str, int], Series], model: str) -> Iterator[Row]:
    what = f"{SHORT[1]} tokens beside {MANY} requests of {LONG[1]}"
    few, many = found["", FEW], found["", MANY]
    limit = at_most_of(many, few, RATIO)
    yield Row(NAME, what, "s", many, "beside one", few, limit, f"{model}, {SLOTS} slots, two tenants")
    theirs = found[PEER, MANY]
    note = f"a client waits {PATIENCE_S:.0f} s" if theirs.median >= PATIENCE_S else ""
    yield Row(NAME, what, "s", many, PEER, theirs, notes=note)
    yield Row(NAME, "the same beside one", "s", few, PEER, found[PEER, FEW])
