"""Workers that are ended or stopped at random moments: every stream must end as if nothing had been.

Rounds with a fault and rounds without one take turns, with the same streams. A bystander reads from
another model all the while: how long it waits for its tokens is compared between the two.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import grpc.aio

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, serving, text_of
from tests.helpers.ties import FACTOR, Greedy, are_same, noise

STREAMS, SLOTS = 16, 8
NAME, OTHER = "micro", "other"
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP)
HEARTBEAT_TIMEOUT_S = 2.0
# Bars: of a model whose worker was stopped, beyond that timeout; of the bystander, by rounds without a fault.
STOP_SLACK_S, GAP_FACTOR = 2.0, 2.0
# Other prompts in every round would need as many answers computed before.
SETS = 4


@dataclasses.dataclass
class Outcome:
    """What was seen. `recovery_s` are the seconds from each death to the next answered request.

    `stopped_s` are the same from each SIGSTOP. The others are the pauses between two tokens that the
    bystander saw: in rounds without a fault, from a fault to the next answer, and before and after that.
    """

    deaths: int = 0  # stopped workers included
    streams: int = 0
    cut: int = 0  # streams that had begun when their worker died
    excused: int = 0  # by the tie rule
    recovery_s: list[float] = dataclasses.field(default_factory=list)
    stopped_s: list[float] = dataclasses.field(default_factory=list)
    calm_s: list[float] = dataclasses.field(default_factory=list)
    fault_s: list[float] = dataclasses.field(default_factory=list)
    around_s: list[float] = dataclasses.field(default_factory=list)

    def beyond_bars(self) -> list[str]:
        """What took longer than it may."""
        found = []
        if max(self.stopped_s, default=0.0) > HEARTBEAT_TIMEOUT_S + STOP_SLACK_S:
            found.append(f"an answer came {max(self.stopped_s):.2f} s after a SIGSTOP")
        factor = max(p99(self.fault_s), p99(self.around_s)) / p99(self.calm_s)
        if factor > GAP_FACTOR:
            found.append(f"another model waited {factor:.2f} times as long")
        return found

    def pauses(self) -> str:
        """What the bystander saw."""
        calm, fault, around = (
            f"{p99(values) * 1000:.1f} ms (longest {max(values) * 1000:.0f} ms, of {len(values):,})"
            for values in (self.calm_s, self.fault_s, self.around_s)
        )
        return f"{fault} from a fault to the next answer, {around} before and after, {calm} without faults"


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[len(values) * 99 // 100]


@dataclasses.dataclass(frozen=True)
class Ask:
    prompt: list[int]
    max_tokens: int


class Bystander:
    """Reads one stream after the other from a model that nobody harms."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.into: list[float] | None = None  # where its pauses are noted
        self.texts: set[str] = set()

    async def read(self) -> None:
        """Until it is cancelled."""
        prompt = [5, 6, 7]
        while True:
            call = self._api.generate(
                OTHER, token_ids=prompt, max_tokens=480, temperature=0.0, ignore_eos=True
            )
            events = []
            last_s = 0.0
            while (event := await call.read()) is not grpc.aio.EOF:
                events.append(event)
                if event.HasField("delta"):
                    now_s = time.monotonic()
                    if self.into is not None and last_s:
                        self.into.append(now_s - last_s)
                    last_s = now_s if self.into is not None else 0.0
            self.texts.add(text_of(events))


class Killing:
    """Rounds of streams on one model, and one fault in every second one."""

    def __init__(self, api: Api, bystander: Bystander, seed: int) -> None:
        self.outcome = Outcome()
        self._bystander = bystander
        self._api = api
        self._random = random.Random(seed)
        self._events = 0
        self._moment = 0
        self._reached = asyncio.Event()

    def asks(self) -> list[Ask]:
        rng = self._random
        return [
            Ask([rng.randrange(3, 200) for _ in range(rng.randint(4, 60))], rng.randint(20, 80))
            for _ in range(STREAMS)
        ]

    async def run(self, rounds: int) -> None:
        """Raises AssertionError for a stream that ends otherwise than it should."""
        sets = [self.asks() for _ in range(SETS)]
        alone = [[await self._answer(ask) for ask in asks] for asks in sets]
        together = await asyncio.gather(*map(self._answer, sets[0]))
        tolerance = FACTOR * noise(list(zip(alone[0], together, strict=True)))
        for number in range(rounds):
            asks, expected = sets[number % SETS], alone[number % SETS]
            self._bystander.into = self.outcome.calm_s
            await asyncio.gather(*map(self._answer, asks))
            self._bystander.into = self.outcome.around_s
            found = await self._round(asks)
            self._bystander.into = None
            for ask, one, other in zip(asks, expected, found, strict=True):
                assert len(other.ids) == ask.max_tokens, "a stream ended early"
                assert are_same(one, other, tolerance), f"round {number}: another text"
                self.outcome.excused += one.ids != other.ids
                self.outcome.streams += 1
            status = await self._api.idle(NAME)
            assert status.state == pb.MODEL_STATE_READY

    async def _round(self, asks: list[Ask]) -> list[Greedy]:
        total = sum(ask.max_tokens for ask in asks)
        self._events, self._moment = 0, self._random.randrange(total * 9 // 10)
        self._reached.clear()
        streams = [asyncio.ensure_future(self._answer(ask)) for ask in asks]
        try:
            await self._reached.wait()
            pid = (await self._api.status(NAME)).worker_process_id
            assert pid
            self.outcome.cut += sum(not stream.done() for stream in streams)
            number = self._random.choice(SIGNALS)
            self._bystander.into = self.outcome.fault_s
            os.kill(pid, number)
            died_s = time.monotonic()
            self.outcome.deaths += 1
            # Sent to the worker that is dying, or while there is none.
            await self._api.inference.Tokenize(inference_pb.TokenizeRequest(model=NAME, text="hello"))
            times_s = self.outcome.stopped_s if number == signal.SIGSTOP else self.outcome.recovery_s
            times_s.append(time.monotonic() - died_s)
            self._bystander.into = self.outcome.around_s
            return await asyncio.gather(*streams)
        finally:
            for stream in streams:
                stream.cancel()

    async def _answer(self, ask: Ask) -> Greedy:
        call = self._api.generate(
            NAME,
            token_ids=ask.prompt,
            max_tokens=ask.max_tokens,
            temperature=0.0,
            repetition_penalty=1.0,
            ignore_eos=True,
            top_logprobs=2,
        )
        tokens: list[pb.Token] = []
        while (event := await call.read()) is not grpc.aio.EOF:
            tokens += event.delta.tokens
            self._events += len(event.delta.tokens)
            if self._events >= self._moment:
                self._reached.set()
            if event.HasField("completed"):
                assert event.completed.usage.completion_token_count == len(tokens) == ask.max_tokens
        return Greedy.of(tokens)


async def kill_workers(folder: Path, spawner: Spawner, rounds: int, seed: int) -> Outcome:
    """So many rounds on a server of its own in `folder`."""
    path = write_tiny_llama(folder / "micro.gguf", n_embd=64, n_layer=2, n_ff=128, context_length=512)
    async with serving(folder, spawner, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S) as (_, api):
        for name in (NAME, OTHER):
            await api.register(name, path)
            await api.load(name, threads=1, flash_attention=False, max_sequences=SLOTS)
        bystander = Bystander(api)
        pid = (await api.status(OTHER)).worker_process_id
        killing = Killing(api, bystander, seed)
        reading = asyncio.ensure_future(bystander.read())
        try:
            await killing.run(rounds)
            assert not reading.done(), reading
        finally:
            reading.cancel()
            await asyncio.wait([reading])
        assert len(bystander.texts) == 1, "the bystander's answers differ"
        assert (await api.status(OTHER)).worker_process_id == pid
        assert await api.serving(f"models/{NAME}") == "SERVING"
    return killing.outcome
