"""Time to the first token of a lone prompt of 512 tokens, against llama-server.

Our server with every option at its default, the layout of the weights chosen by itself included; the peer at
its default, and without repacked weights beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import crowd, sides
from benchmarks.asks import Ask, Prompts
from benchmarks.measure import Plan, Result, Series
from benchmarks.sides import Side

NAME = "ttft"
PROMPT = 512
TOKENS = 8


def run(plan: Plan) -> Iterator[Result]:
    model = plan.model("tinyllama")
    with sides.all_sides(plan, model, plain=True) as opened:
        found = sides.in_turn(plan, NAME, opened, plan.rounds_of(5, 1), measure)
        note = f"{model}, ours {sides.layout(opened[0].repack)}"
    series = {name: Series(values) for name, values in found.items()}
    yield from sides.rows(NAME, f"first token, prompt of {PROMPT}", "s", series, 0.65, note)


def measure(side: Side, prompts: Prompts) -> float:
    """Seconds."""
    [answer] = crowd.play(side.target, [Ask(prompts.take(PROMPT), TOKENS, side.model)])
    return answer.ttft_s
