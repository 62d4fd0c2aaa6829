"""Workers that are ended at random moments: every stream must end as if nothing had been."""

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
from tests.helpers.rpc import Api, serving
from tests.helpers.ties import FACTOR, Greedy, are_same, noise

STREAMS, SLOTS = 16, 8
NAME = "micro"
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
# Other prompts in every round would need as many answers computed before.
SETS = 4


@dataclasses.dataclass
class Outcome:
    """What was seen. `recovery_s` are the seconds from each death to the next answered request."""

    deaths: int = 0
    streams: int = 0
    cut: int = 0  # streams that had begun when their worker died
    excused: int = 0  # by the tie rule
    recovery_s: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Ask:
    prompt: list[int]
    max_tokens: int


class Killing:
    """Rounds of streams on one model, and one death in each."""

    def __init__(self, api: Api, seed: int) -> None:
        self.outcome = Outcome()
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
            found = await self._round(asks)
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
            os.kill(pid, self._random.choice(SIGNALS))
            died_s = time.monotonic()
            self.outcome.deaths += 1
            # Sent to the worker that is dying, or while there is none.
            await self._api.inference.Tokenize(inference_pb.TokenizeRequest(model=NAME, text="hello"))
            self.outcome.recovery_s.append(time.monotonic() - died_s)
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
    async with serving(folder, spawner) as (_, api):
        await api.register(NAME, path)
        await api.load(NAME, threads=1, flash_attention=False, max_sequences=SLOTS)
        killing = Killing(api, seed)
        await killing.run(rounds)
        assert await api.serving(f"models/{NAME}") == "SERVING"
    return killing.outcome
