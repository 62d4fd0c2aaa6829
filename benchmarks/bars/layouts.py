"""The KV cache in parts against one pool: what each costs where sequences meet. Ours against ours.

A part for each sequence is the default; the pool is what `--kv-unified` gives. Both have plain weights,
so that nothing else differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks import crowd, sides
from benchmarks.asks import Ask, Prompts, wall_s
from benchmarks.bars import prefix, stall
from benchmarks.measure import Plan, Result, Series
from benchmarks.sides import Side

NAME = "layouts"
POOL = "one pool"
STREAMS = 16
PROMPT = 128
TOKENS = 64
CONTEXT = 2048


def run(plan: Plan) -> Iterator[Result]:
    model = plan.model("tinyllama")
    rounds = plan.rounds_of(3, 1)
    with ExitStack() as opened:
        both = [
            opened.enter_context(
                sides.ours(
                    plan,
                    model,
                    sequences=STREAMS,
                    context=CONTEXT,
                    name=name,
                    repack=False,
                    kv_unified=unified,
                )
            )
            for name, unified in (("", False), (POOL, True))
        ]
        sides.warm_up(both)
        walls = sides.in_turn(plan, f"{NAME}, streams", both, rounds, _streams)
        shared = sides.in_turn(plan, f"{NAME}, prefix", both, rounds, prefix.at_once)
        stalls = sides.in_turn(plan, f"{NAME}, stall", both, rounds, stall.measure)
    note = f"{model}, plain weights"
    found = {name: Series(values) for name, values in walls.items()}
    yield from sides.rows(NAME, f"{STREAMS} streams, {PROMPT} in, {TOKENS} out", "s", found, note=note)
    found = {name: Series([wall_s(answers) for answers in rounds_]) for name, rounds_ in shared.items()}
    yield from sides.rows(NAME, "8 at once, 768 tokens in common", "s", found)
    found = {name: Series([f.ttft_s for f in figures]) for name, figures in stalls.items()}
    yield from sides.rows(NAME, "a prompt of 1,500 beside three streams, first token", "s", found)
    found = {name: Series([f.longest_gap_s * 1000 for f in figures]) for name, figures in stalls.items()}
    yield from sides.rows(NAME, "longest pause of these streams", "ms", found)


def _streams(side: Side, prompts: Prompts) -> float:
    asks = [Ask(prompts.take(PROMPT), TOKENS, side.model) for _ in range(STREAMS)]
    return wall_s(crowd.play(side.target, asks))
