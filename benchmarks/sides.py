"""The sides of a comparison: servers with one model loaded, measured in turn, never at the same time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from bear_grpc.client import Client
from bear_grpc.config import available_cores
from benchmarks import crowd, models, peer, servers
from benchmarks.asks import Ask, Prompts
from benchmarks.measure import Plan, Row, Series, at_most_of
from tools.progress import status

PEER = "llama-server"
# What runs before anything is measured: memory faults in, threads start, connections open.
WARM_UP_TOKENS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """A running server. `name` is empty for ours, `repack` is how it keeps the weights."""

    name: str
    target: str
    model: str
    repack: bool

    @property
    def is_ours(self) -> bool:
        return not self.name


@contextlib.contextmanager
def ours(
    plan: Plan,
    model: str,
    *,
    sequences: int | None = None,
    context: int | None = None,
    name: str = "",
    **options: bool,
) -> Iterator[Side]:
    """Our server with the model, all else at its default: what it measures at a load included."""
    file = models.get(model)
    with servers.bear("--allow-path", str(file.parent)) as server:
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            servers.register(client, model, file)
            plan.settle()
            client.load_model(model, max_sequences=sequences, context_length=context, **options)
            repack = client.get_model_status(model).status.effective_options.repack
        yield Side(name, server.target, model, repack)


@contextlib.contextmanager
def theirs(
    model: str, *, sequences: int | None = None, context: int | None = None, repack: bool = True
) -> Iterator[Side]:
    """llama-server with the model and a thread for each core; its context is one for all sequences."""
    arguments = ["--threads", str(available_cores())]
    if sequences is not None:
        arguments += ["--parallel", str(sequences)]
    if context is not None:
        arguments += ["--ctx-size", str(context * (sequences or 1))]
    name = PEER
    if not repack:
        arguments.append("--no-repack")
        name += " --no-repack"
    with servers.llama_server(peer.get().server, models.get(model), arguments) as server:
        yield Side(name, f"http://127.0.0.1:{server.port}", model, repack)


@contextlib.contextmanager
def all_sides(
    plan: Plan, model: str, *, sequences: int | None = None, context: int | None = None, plain: bool = False
) -> Iterator[list[Side]]:
    """Ours and the peer's, in this order; with `plain` the peer without repacked weights too.

    An idle server computes nothing, so all of them stay up while one is measured.
    """
    with ExitStack() as opened:
        sides = [opened.enter_context(ours(plan, model, sequences=sequences, context=context))]
        sides.append(opened.enter_context(theirs(model, sequences=sequences, context=context)))
        if plain:
            without = theirs(model, sequences=sequences, context=context, repack=False)
            sides.append(opened.enter_context(without))
        warm_up(sides)
        yield sides


def warm_up(sides: Sequence[Side]) -> None:
    for side in sides:
        crowd.play(side.target, [Ask(Prompts(0).take(32), WARM_UP_TOKENS, side.model)])


def in_turn(
    plan: Plan, title: str, sides: Sequence[Side], rounds: int, measure: Callable[[Side, Prompts], T]
) -> dict[str, list[T]]:
    """What `measure` gave by side's name, measured ours, peer, ours, peer ...

    Every call gets prompts that its server has not seen; those of a round are the same for all sides, unless
    a measurement was disturbed and made again.
    """
    found: dict[str, list[T]] = {side.name: [] for side in sides}
    with status(f"{title}: {rounds} rounds") as line:
        for index in range(rounds):
            for side in sides:
                line.update(f"round {index + 1}, {side.name or 'ours'}")
                attempt = partial(_attempt, measure, side, (_number(title), index), itertools.count())
                found[side.name].append(plan.undisturbed(attempt))
    return found


def _attempt(
    measure: Callable[[Side, Prompts], T], side: Side, seed: tuple[int, ...], attempts: Iterator[int]
) -> T:
    return measure(side, Prompts(*seed, next(attempts)))


def _number(title: str) -> int:
    """A seed from a text, the same in every process."""
    return int.from_bytes(title.encode()[:24], "big")


def rows(
    bar: str, what: str, unit: str, found: dict[str, Series], ratio: float | None = None, note: str = ""
) -> Iterator[Row]:
    """Ours against each other side by name; `ratio` is the limit against the peer at its default."""
    own = found[""]
    for name, other in found.items():
        if name:
            limit = at_most_of(own, other, ratio) if ratio is not None and name == PEER else None
            yield Row(bar, what, unit, own, name, other, limit, note)
            note = ""


def layout(repack: bool) -> str:
    """How weights are kept, for a note."""
    return "repacked" if repack else "plain"
