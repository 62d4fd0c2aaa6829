"""A prefix that requests share: eight at once, and eight one after the other, against llama-server.

768 tokens are shared and 32 are each request's own; answers have 32 tokens. The prefix is a new one in every
round, and all servers keep what they keep by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks import crowd, sides
from benchmarks.asks import Answer, Ask, Prompts, wall_s
from benchmarks.measure import Curve, Plan, Result, Series
from benchmarks.sides import Side

NAME = "prefix"
REQUESTS = 8
SHARED = 768
OWN = 32
TOKENS = 32
CONTEXT = 1024
PICTURE = "prefix"


def run(plan: Plan) -> Iterator[Result]:
    model = plan.model("tinyllama")
    rounds = plan.rounds_of(3, 1)
    with sides.all_sides(plan, model, sequences=REQUESTS, context=CONTEXT, plain=True) as opened:
        together = sides.in_turn(plan, f"{NAME}, at once", opened, rounds, at_once)
        arriving = sides.in_turn(plan, f"{NAME}, in turn", opened, rounds, one_by_one)
        note = f"{model}, ours {sides.layout(opened[0].repack)}"
    wall = _series(together, wall_s)
    yield from sides.rows(NAME, f"{REQUESTS} at once", "s", wall, 0.2, note)
    computed = _series(together, _computed)
    yield from sides.rows(NAME, f"{REQUESTS} at once, prompt tokens computed", "", computed)
    for what, index in (("first", 0), ("last", -1)):
        first = {name: Series([a[index].ttft_s for a in rounds_]) for name, rounds_ in arriving.items()}
        yield from sides.rows(NAME, f"one by one, first token of the {what}", "s", first)
    for name, found in arriving.items():
        medians = [Series([answers[i].ttft_s for answers in found]).median for i in range(REQUESTS)]
        yield Curve(PICTURE, name or "bear_grpc", [(i + 1.0, ttft) for i, ttft in enumerate(medians)])


def at_once(side: Side, prompts: Prompts) -> list[Answer]:
    shared = prompts.take(SHARED)
    asks = [Ask(shared + prompts.more(OWN), TOKENS, side.model) for _ in range(REQUESTS)]
    return crowd.play(side.target, asks)


def one_by_one(side: Side, prompts: Prompts) -> list[Answer]:
    """Each is sent when the one before has ended."""
    shared = prompts.take(SHARED)
    return crowd.play(
        side.target,
        [
            Ask(shared + prompts.more(OWN), TOKENS, side.model, after=[index - 1] if index else [])
            for index in range(REQUESTS)
        ],
    )


def _series(found: dict[str, list[list[Answer]]], of: Callable[[list[Answer]], float]) -> dict[str, Series]:
    return {name: Series([of(answers) for answers in rounds]) for name, rounds in found.items()}


def _computed(answers: list[Answer]) -> int:
    """Prompt tokens that were not taken from a cache, as the server tells."""
    return sum(SHARED + OWN - answer.cached_tokens for answer in answers)
