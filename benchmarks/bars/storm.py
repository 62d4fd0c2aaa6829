"""A storm of cancels: thousands of requests of which half are cancelled at random moments.

On the micro model, 64 at a time. All others must bring every token that they asked for, and nothing may be
left behind. A part of them is asked again alone: how many texts are the same is told, not judged, as floating
point depends on what else is in a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from bear_grpc.client import Client
from bear_grpc.v1.types_pb2 import ModelStatus
from benchmarks import crowd, servers, sides
from benchmarks.asks import Answer, Ask, Prompts, wall_s
from benchmarks.measure import Plan, Result, Row, Series, at_most
from benchmarks.sides import Side
from tools.progress import status

NAME = "storm"
MODEL = "micro"
CONCURRENCY = 64
SEQUENCES = 16
CONTEXT = 256
CANCELLED_TOKENS = 160
TIMEOUT_S = 10.0


def run(plan: Plan) -> Iterator[Result]:
    asks = storm(plan.count(2000, 400), Prompts(1))
    sample = plan.count(200, 40)
    with (
        status(f"{NAME}: {len(asks)} requests"),
        sides.ours(plan, MODEL, sequences=SEQUENCES, context=CONTEXT) as side,
    ):
        answers = crowd.play(side.target, asks, concurrency=CONCURRENCY)
        left = _at_rest(side)
        ended = [(ask, answer) for ask, answer in zip(asks, answers, strict=True) if answer.completed]
        again = [Ask(ask.prompt, ask.max_tokens, MODEL) for ask, _ in ended[:sample]]
        alone = crowd.play(side.target, again, concurrency=1)
    return _rows(asks, answers, left, [answer for _, answer in ended[:sample]], alone)


def storm(count: int, prompts: Prompts) -> list[Ask]:
    """Every second one is cancelled: while it waits or its prompt is read, or after some text.

    Those that are cancelled ask for more tokens than they live to see.
    """
    asks = []
    for index in range(count):
        prompt, tokens = prompts.take(prompts.number(8, 64)), prompts.number(16, 48)
        seconds, pieces = None, None
        if index % 2:
            tokens = CANCELLED_TOKENS
            # A message may hold several tokens: few messages, or none.
            pieces = prompts.number(1, 4) if index % 4 == 3 else None
            seconds = prompts.between(0.0, 0.005 if pieces else 0.3)
        asks.append(Ask(prompt, tokens, MODEL, cancel_s=seconds, cancel_tokens=pieces))
    return asks


def _rows(
    asks: Sequence[Ask],
    answers: Sequence[Answer],
    left: ModelStatus,
    survivors: Sequence[Answer],
    alone: Sequence[Answer],
) -> Iterator[Row]:
    cancelled = sum(not answer.completed for answer in answers)
    wrong = Series([wrong_ends(asks, answers)])
    note = f"{len(asks)} requests, {cancelled} cancelled, {CONCURRENCY} at a time"
    yield Row(NAME, "ended with a wrong number of tokens", "", wrong, limit=at_most(wrong, 0), notes=note)
    requests = Series([left.running_count + left.waiting_count])
    yield Row(NAME, "requests left", "", requests, limit=at_most(requests, 0))
    cells = Series([servers.held_tokens(left)])
    yield Row(NAME, "tokens held in the KV cache", "", cells, limit=at_most(cells, 0))
    yield Row(NAME, "speed", "requests/s", Series([len(answers) / wall_s(answers)]))
    same = sum(one.text == other.text for one, other in zip(survivors, alone, strict=True))
    share = Series([100 * same / len(alone)])
    yield Row(NAME, "the same text alone", "%", share, notes=f"of {len(alone)} that were not cancelled")


def wrong_ends(asks: Sequence[Ask], answers: Sequence[Answer]) -> int:
    """Answers that nobody cancelled and that did not bring all tokens."""
    pairs = zip(asks, answers, strict=True)
    return sum(
        answer.tokens != ask.max_tokens if answer.completed else answer.cancelled_s is None
        for ask, answer in pairs
    )


def _at_rest(side: Side) -> ModelStatus:
    """The status once nothing is under way, or what it is when that does not come about."""
    deadline = time.monotonic() + TIMEOUT_S
    with Client(side.target) as client:
        while True:
            found = client.get_model_status(side.model).status
            busy = found.running_count + found.waiting_count
            if not (busy or servers.held_tokens(found)) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)
