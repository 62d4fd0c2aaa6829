"""From the start of `bear serve --load bear-demo` to SERVING, and to the first text.

The environment is installed and its files are in the page cache: a second `make demo`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from bear_grpc.client import Client
from benchmarks import servers
from benchmarks.measure import Plan, Row, Series
from tools.progress import status

NAME = "startup"
MODEL = "bear-demo"


def run(plan: Plan) -> Iterator[Row]:
    serving: list[float] = []
    first: list[float] = []
    answer: list[float] = []
    rounds = plan.rounds_of(5, 2)
    _start(MODEL)
    with status(f"{NAME}: {rounds} rounds") as line:
        for index in range(rounds):
            line.update(f"round {index + 1}")
            times = plan.undisturbed(lambda: _start(MODEL))
            serving.append(times[0])
            first.append(times[1])
            answer.append((times[1] - times[0]) * 1000)
    return _rows(Series(serving), Series(first), Series(answer))


def _rows(serving: Series, first: Series, answer: Series) -> Iterator[Row]:
    yield Row(NAME, "start to SERVING, model loaded", "s", serving)
    yield Row(NAME, "start to first text", "s", first)
    yield Row(NAME, "SERVING to first text, chat", "ms", answer)


def _start(model: str) -> tuple[float, float]:
    """Seconds from the start to SERVING and to the first text of a chat answer."""
    with servers.bear("--load", model) as server:
        serving = servers.wait_until_serving(server)
        with Client(server.target) as client:
            messages = [{"role": "user", "content": "Hello! Who are you?"}]
            for _ in client.stream_text(model, messages=messages, max_tokens=8):
                return serving, time.perf_counter() - server.started_s
    raise AssertionError("a generation without text")
