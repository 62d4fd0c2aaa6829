"""A long prompt that arrives while streams run: how long these stand still, against llama-server.

Three streams run; a prompt of 1,500 tokens comes when each has brought 16 pieces of text. Judged are the
longest pause in the three until the long prompt's first token, and when that token comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks import crowd, sides
from benchmarks.asks import Answer, Ask, Prompts, gaps, longest_gap_s
from benchmarks.measure import Curve, Plan, Result, Series, percentile
from benchmarks.sides import PEER, Side

NAME = "stall"
RUNNING = 3
LONG = 1500
TOKENS = 8
# Text that the streams bring before; also what is shown of the time around.
BEFORE = 16
AROUND_S = 1.0
CONTEXT = 2048
PICTURE = "stall"


@dataclass(frozen=True)
class Figures:
    """Of one round, in seconds. `pauses` are (end, length), 0 being when the long prompt was sent."""

    longest_gap_s: float
    ttft_s: float
    pauses: list[tuple[float, float]]


def run(plan: Plan) -> Iterator[Result]:
    model = plan.model("tinyllama")
    with sides.all_sides(plan, model, sequences=RUNNING + 1, context=CONTEXT, plain=True) as opened:
        found = sides.in_turn(plan, NAME, opened, plan.rounds_of(3, 1), measure)
        note = f"{model}, ours {sides.layout(opened[0].repack)}"
    gap = _series(found, lambda figures: figures.longest_gap_s * 1000)
    yield from sides.rows(NAME, "longest pause of a stream", "ms", gap, 0.05, note)
    ttft = _series(found, lambda figures: figures.ttft_s)
    yield from sides.rows(NAME, "the long prompt's first token", "s", ttft, 1.0)
    yield from sides.rows(NAME, "pauses meanwhile, p99", "ms", _series(found, _p99_ms))
    for name in ("", PEER):
        yield Curve(PICTURE, name or "bear_grpc", [(at, gap * 1000) for at, gap in found[name][0].pauses])


def _series(found: dict[str, list[Figures]], of: Callable[[Figures], float]) -> dict[str, Series]:
    return {name: Series([of(figures) for figures in rounds]) for name, rounds in found.items()}


def measure(side: Side, prompts: Prompts) -> Figures:
    running = list(range(RUNNING))
    asks = [Ask(prompts.take(32), CONTEXT - 64, side.model, cancel_with=RUNNING) for _ in running]
    asks.append(Ask(prompts.take(LONG), TOKENS, side.model, after=running, after_tokens=BEFORE))
    *streams, long = crowd.play(side.target, asks)
    return figures_of(streams, long)


def figures_of(streams: list[Answer], long: Answer) -> Figures:
    """The window that is judged ends with the long prompt's first token."""
    sent, first = long.asked_s, long.times[0]
    pauses = [pause for stream in streams for pause in gaps(stream, sent - AROUND_S, first + AROUND_S)]
    shown = sorted((end - sent, length) for end, length in pauses)
    return Figures(longest_gap_s(streams, sent, first), long.ttft_s, shown)


def _p99_ms(figures: Figures) -> float:
    return percentile([length for end, length in figures.pauses if end > 0], 99) * 1000
