"""The part of a step that is neither the forward pass nor choosing tokens, with 16 sequences running.

As the engine counts it (`ModelStatus.counters`), over one run of 16 streams; of our server only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from bear_grpc.client import Client
from bear_grpc.v1.types_pb2 import EngineCounters
from benchmarks import crowd, sides
from benchmarks.asks import Ask, Prompts
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Result, Row, Series, at_most
from benchmarks.sides import Side

NAME = "overhead"
SEQUENCES = 16
PROMPT = 32
TOKENS = 96
CONTEXT = 256
LIMIT_PERCENT = 2.0
# The status of a worker may be so old.
SETTLE_S = 10.0


@dataclass(frozen=True)
class Steps:
    """What the counters grew by in one run."""

    count: int
    forward_s: float
    sampling_s: float
    overhead_s: float

    @property
    def seconds(self) -> float:
        return self.forward_s + self.sampling_s + self.overhead_s

    @property
    def overhead_percent(self) -> float:
        return 100 * self.overhead_s / self.seconds


def run(plan: Plan) -> Iterator[Result]:
    for model in (plan.model("tinyllama"), "micro"):
        with sides.ours(plan, model, sequences=SEQUENCES, context=CONTEXT) as side:
            measure(side, Prompts(0))
            [found] = sides.in_turn(plan, f"{NAME}, {model}", [side], plan.rounds_of(5, 1), measure).values()
        percent = Series([steps.overhead_percent for steps in found])
        middle = sorted(found, key=lambda steps: steps.overhead_percent)[len(found) // 2]
        per_step = [1000 * s / middle.count for s in (middle.forward_s, middle.sampling_s, middle.overhead_s)]
        note = "ms a step: forward {:.2f}, sampling {:.2f}, else {:.3f}".format(*per_step)
        # What is asked is of a real model: of the micro model it is told.
        limit = None if model == "micro" else at_most(percent, LIMIT_PERCENT, "≤ 2 %")
        yield Row(NAME, f"of a step, {SEQUENCES} sequences, {model}", "%", percent, limit=limit, notes=note)


def measure(side: Side, prompts: Prompts) -> Steps:
    """One run of the streams.

    Raises:
        SetupError: the engine counts no times.
    """
    with Client(side.target) as client:
        before = _settled(client, side.model)
        crowd.play(side.target, [Ask(prompts.take(PROMPT), TOKENS, side.model) for _ in range(SEQUENCES)])
        steps = grown(before, _settled(client, side.model))
    if not steps.count or not steps.forward_s:
        raise SetupError("the engine counts no steps or no times")
    return steps


def grown(before: EngineCounters, after: EngineCounters) -> Steps:
    return Steps(
        after.step_count - before.step_count,
        after.forward_seconds - before.forward_seconds,
        after.sampling_seconds - before.sampling_seconds,
        after.overhead_seconds - before.overhead_seconds,
    )


def _settled(client: Client, model: str) -> EngineCounters:
    """The counters once nothing runs, and once they say the same twice."""
    deadline = time.monotonic() + SETTLE_S
    last = None
    while time.monotonic() < deadline:
        found = client.get_model_status(model).status
        counters = found.counters
        ended = counters.finished_sequence_count + counters.cancelled_sequence_count
        quiet = not found.running_count and ended == counters.submitted_sequence_count
        if quiet and counters == last:
            return counters
        last = counters
        time.sleep(0.3)
    raise SetupError("the engine does not come to rest")
