"""A model so small that the server itself is the work: 16 streams, tokens per second, against llama-server.

2 layers, 64 wide, a vocabulary of 32,000. What a client gets, so the clients' own work is in the figure, on
the same cores.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import crowd, sides
from benchmarks.asks import Ask, Prompts, rate
from benchmarks.measure import Plan, Result, Row, Series, at_least
from benchmarks.sides import PEER, Side

NAME = "micro"
MODEL = "micro"
STREAMS = 16
PROMPT = 16
TOKENS = 256
CONTEXT = 512


def run(plan: Plan) -> Iterator[Result]:
    with sides.all_sides(plan, MODEL, sequences=STREAMS, context=CONTEXT) as opened:
        found = sides.in_turn(plan, NAME, opened, plan.rounds_of(7, 3), measure)
    rates, other = (Series(values) for values in found.values())
    limit = at_least(rates, other, 1.0)
    yield Row(NAME, f"{STREAMS} streams", "tok/s", rates, PEER, other, limit, "aim 1.5 x")


def measure(side: Side, prompts: Prompts) -> float:
    """Tokens per second of all streams together."""
    asks = [Ask(prompts.take(PROMPT), TOKENS, side.model) for _ in range(STREAMS)]
    return rate(crowd.play(side.target, asks))
