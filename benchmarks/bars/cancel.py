"""From a client's cancel to the slot being free: the moment at which a request that waited for it is started.

One sequence runs at a time. In decode the running request is cancelled at a random moment of a step, in
prefill at a random moment of a prompt of 1,500 tokens. Our server tells the waiting client when it has the
slot; of the peer only the first token can be seen, so that is compared and the other judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import crowd, sides
from benchmarks.asks import Answer, Ask, Prompts
from benchmarks.measure import Plan, Result, Row, Series, at_most, percentile
from benchmarks.sides import PEER, Side

NAME = "cancel"
LONG = 1500
CONTEXT = 2048
PREFILL_LIMIT_MS = 300.0
# The first one may have no text.
WAITING_TOKENS = 4
# The waiting request comes so long before the cancel at least.
LEAD_S = 0.05


@dataclass(frozen=True)
class Figures:
    """Milliseconds, one a cancel: to the slot (ours only), to the next first token, of the steps before."""

    slot: list[float]
    first: list[float]
    steps: list[float]


def run(plan: Plan) -> Iterator[Result]:
    model = plan.model("tinyllama")
    decodes, prefills = plan.count(200, 30), plan.count(40, 8)
    latest_s = plan.count(3000, 250) / 1000

    def decode(side: Side, prompts: Prompts) -> Figures:
        return figures_of(_play(side, in_decode(side.model, prompts, decodes)))

    def prefill(side: Side, prompts: Prompts) -> Figures:
        # A cancel may take the peer the whole prompt.
        count = prefills if side.is_ours else prefills // 4
        return figures_of(_play(side, in_prefill(side.model, prompts, count, latest_s)))

    with sides.all_sides(plan, model, sequences=1, context=CONTEXT) as opened:
        decoding = sides.in_turn(plan, f"{NAME}, decode", opened, 1, decode)
        prefilling = sides.in_turn(plan, f"{NAME}, prefill", opened, 1, prefill)
    own, peer = (figures[0] for figures in decoding.values())
    step_ms = Series(own.steps).median
    p99 = Series([percentile(own.slot, 99)])
    note = (
        f"{model}, {len(own.slot)} cancels, a step {step_ms:.1f} ms, median {Series(own.slot).median:.1f} ms"
    )
    yield Row(
        NAME, "in decode: slot free, p99", "ms", p99, limit=at_most(p99, step_ms, "≤ a step"), notes=note
    )
    yield Row(NAME, "in decode: next first token", "ms", Series(own.first), PEER, Series(peer.first))
    own, peer = (figures[0] for figures in prefilling.values())
    p99 = Series([percentile(own.slot, 99)])
    note = f"{model}, {len(own.slot)} cancels, median {Series(own.slot).median:.1f} ms"
    limit = at_most(p99, PREFILL_LIMIT_MS)
    yield Row(NAME, "in prefill: slot free, p99", "ms", p99, limit=limit, notes=note)
    yield Row(NAME, "in prefill: next first token", "ms", Series(own.first), PEER, Series(peer.first))


def _play(side: Side, asks: list[Ask]) -> list[Answer]:
    return crowd.play(side.target, asks, may_be_silent=True)


def in_decode(model: str, prompts: Prompts, count: int) -> list[Ask]:
    """Pairs: one that is cancelled, one that waits for its slot. A pair begins when the last has ended."""
    asks: list[Ask] = []
    for index in range(0, 2 * count, 2):
        pieces, moment = prompts.number(4, 12), prompts.between(0.0, 0.05)
        after = [index - 1] if index else []
        asks.append(
            Ask(prompts.take(2), 200, model, after=after, cancel_tokens=pieces, cancel_s=LEAD_S + moment)
        )
        asks.append(Ask(prompts.take(2), WAITING_TOKENS, model, after=[index], after_tokens=pieces))
    return asks


def in_prefill(model: str, prompts: Prompts, count: int, latest_s: float) -> list[Ask]:
    """The same, cancelled before its first token."""
    asks: list[Ask] = []
    for index in range(0, 2 * count, 2):
        after = [index - 1] if index else []
        moment = prompts.between(2 * LEAD_S, latest_s)
        asks.append(Ask(prompts.take(LONG), 8, model, after=after, cancel_s=moment))
        asks.append(Ask(prompts.take(2), WAITING_TOKENS, model, after=after, delay_s=LEAD_S))
    return asks


def figures_of(answers: list[Answer]) -> Figures:
    slot, first, steps = [], [], []
    for stopped, next_ in zip(answers[::2], answers[1::2], strict=True):
        if (at := stopped.cancelled_s) is None:
            continue  # it had ended before
        if not next_.times:
            continue  # it wrote no text: nothing tells when it began
        first.append((next_.times[0] - at) * 1000)
        slot.append(((next_.started_s or next_.times[0]) - at) * 1000)
        if len(stopped.times) > 1:
            steps.append(stopped.first_to_last_s / (len(stopped.times) - 1) * 1000)
    return Figures(slot, first, steps)
