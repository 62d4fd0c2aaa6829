"""Many streams at once: the time from the first request to the end of the last answer, by number of streams.

Prompts of 128 tokens, answers of 64. The peer has as many slots as there are streams at most; its context is
what all of them need together, as is ours.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import crowd, sides
from benchmarks.asks import Ask, Prompts, rate, wall_s
from benchmarks.measure import Curve, Plan, Result, Row, Series, at_most_of
from benchmarks.sides import PEER, Side

NAME = "streams"
COUNTS = (1, 2, 4, 8, 16)
PROMPT = 128
TOKENS = 64
CONTEXT = 256
PICTURE = "streams"

# By number of streams: seconds and tokens per second.
Figures = dict[int, tuple[float, float]]


def run(plan: Plan) -> Iterator[Result]:
    model = plan.model("tinyllama")
    with sides.all_sides(plan, model, sequences=COUNTS[-1], context=CONTEXT, plain=True) as opened:
        found = sides.in_turn(plan, NAME, opened, plan.rounds_of(3, 1), measure)
    own, peer, plain = opened
    wall, other = (_walls(found[side.name], COUNTS[-1]) for side in (own, peer))
    what, note = (
        f"{COUNTS[-1]} streams, {PROMPT} in, {TOKENS} out",
        f"{model}, ours {sides.layout(own.repack)}",
    )
    yield Row(NAME, what, "s", wall, PEER, other, at_most_of(wall, other, 0.75), note)
    same = peer if own.repack else plain
    other = _walls(found[same.name], COUNTS[-1])
    note = "the peer at our layout of weights"
    yield Row(NAME, what, "s", wall, same.name, other, at_most_of(wall, other, 0.95), note)
    for count in COUNTS[:-1]:
        one, other = (_walls(found[name], count) for name in (own.name, PEER))
        yield Row(NAME, f"{count} streams" if count > 1 else "1 stream", "s", one, PEER, other)
    for side in opened:
        points = [(float(n), _rates(found[side.name], n).median) for n in COUNTS]
        yield Curve(PICTURE, side.name or "bear_grpc", points)


def measure(side: Side, prompts: Prompts) -> Figures:
    """One number of streams after the other."""
    figures = {}
    for count in COUNTS:
        asks = [Ask(prompts.take(PROMPT), TOKENS, side.model) for _ in range(count)]
        answers = crowd.play(side.target, asks)
        figures[count] = (wall_s(answers), rate(answers))
    return figures


def _walls(rounds: list[Figures], count: int) -> Series:
    return Series([figures[count][0] for figures in rounds])


def _rates(rounds: list[Figures], count: int) -> Series:
    return Series([figures[count][1] for figures in rounds])
