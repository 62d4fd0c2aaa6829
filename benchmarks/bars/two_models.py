"""Two models busy at once, each in its own worker: tokens per second together, against one of them alone.

The same file under two names, one stream each; then four streams each, which is told but not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from bear_grpc.client import Client
from benchmarks import crowd, models, servers, sides
from benchmarks.asks import Answer, Ask, Prompts, gaps, longest_gap_s, rate
from benchmarks.measure import Plan, Result, Row, Series, at_least, percentile
from benchmarks.sides import Side

NAME = "two-models"
PROMPT = 16
CONTEXT = 512
STREAMS = 4
ALONE = "one of them alone"


@dataclass(frozen=True)
class Figures:
    """Of one run: tokens per second of all streams, and pauses in seconds."""

    rate: float
    longest_gap_s: float
    p99_s: float


def run(plan: Plan) -> Iterator[Result]:
    model, tokens, rounds = plan.model("tinyllama"), plan.count(128, 64), plan.rounds_of(5, 1)
    file = models.get(model)
    names = (model, f"{model}-2")
    with servers.bear("--allow-path", str(file.parent)) as server:
        servers.wait_until_serving(server)
        with Client(server.target) as client:
            for name in names:
                servers.register(client, name, file)
                plan.settle()
                client.load_model(name, max_sequences=STREAMS, context_length=CONTEXT)
            repack = client.get_model_status(model).status.effective_options.repack
        # Two sides of one server: who is asked.
        both, alone = (Side(name, server.target, model, repack) for name in ("", ALONE))

        def measure(streams: int, side: Side, prompts: Prompts) -> Figures:
            asked = [name for name in (names if side.is_ours else names[:1]) for _ in range(streams)]
            asks = [Ask(prompts.take(PROMPT), tokens, name) for name in asked]
            return _figures(crowd.play(server.target, asks))

        measure(1, both, Prompts(0))
        for streams in (1, STREAMS):
            title = f"{NAME}, {streams} each"
            found = sides.in_turn(plan, title, (both, alone), rounds, partial(measure, streams))
            yield from _rows(streams, found[both.name], found[alone.name], model)


def _rows(streams: int, both: list[Figures], alone: list[Figures], model: str) -> Iterator[Row]:
    what = f"{streams} streams each" if streams > 1 else "1 stream each"
    rates, other = (Series([figures.rate for figures in found]) for found in (both, alone))
    limit = at_least(rates, other, 1.0) if streams == 1 else None
    yield Row(NAME, f"{what}, together", "tok/s", rates, ALONE, other, limit, model)
    longest, other = (Series([f.longest_gap_s * 1000 for f in found]) for found in (both, alone))
    p99 = Series([figures.p99_s * 1000 for figures in both])
    yield Row(NAME, f"{what}, longest pause", "ms", longest, ALONE, other, notes=f"p99 {p99} ms")


def _figures(answers: list[Answer]) -> Figures:
    begin, end = min(a.times[0] for a in answers), max(a.ended_s for a in answers)
    pauses = [length for answer in answers for _, length in gaps(answer, begin, end)]
    return Figures(rate(answers), longest_gap_s(answers, begin, end), percentile(pauses, 99))
