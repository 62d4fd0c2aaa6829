"""A twentieth of the storm of cancels: who stays gets what it would get alone, and nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import inference_service_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, serving
from tests.helpers.ties import FACTOR, Greedy, are_same, noise

REQUESTS, CONCURRENCY, SLOTS = 100, 64, 8
PREFIXES = 4

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request, and after how many messages its client leaves; None: never."""

    prompt: list[int]
    max_tokens: int
    leaves_after: int | None


def asks() -> list[Ask]:
    """Some prompts begin alike, so that prefixes are shared with those that leave."""
    rng = random.Random(5)
    starts = [[rng.randrange(3, 200) for _ in range(80)] for _ in range(PREFIXES)]
    return [
        Ask(
            [*rng.choice(starts), *(rng.randrange(3, 200) for _ in range(rng.randint(1, 40)))],
            rng.randint(8, 40),
            rng.randint(0, 12) if index % 2 else None,
        )
        for index in range(REQUESTS)
    ]


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    thread = Spawner()
    yield thread
    thread.close()
    thread.join()


@pytest.fixture
async def api(spawner: Spawner, tmp_path: Path) -> AsyncIterator[Api]:
    path = write_tiny_llama(tmp_path / "storm.gguf", n_embd=64, n_layer=2, n_ff=128, context_length=512)
    async with serving(tmp_path, spawner) as (_, api):
        await api.register("storm", path)
        await api.load("storm", threads=1, flash_attention=False, max_sequences=SLOTS)
        yield api


async def generate(api: Api, ask: Ask) -> Greedy | None:
    """The whole answer; None for a client that left."""
    call = api.generate(
        "storm",
        token_ids=ask.prompt,
        max_tokens=ask.max_tokens,
        temperature=0.0,
        repetition_penalty=1.0,
        ignore_eos=True,
        top_logprobs=2,
    )
    tokens: list[pb.Token] = []
    messages = 0
    while ask.leaves_after is None or messages < ask.leaves_after:
        event = await call.read()
        if event is grpc.aio.EOF:
            return Greedy.of(tokens) if ask.leaves_after is None else None
        tokens += event.delta.tokens
        messages += 1
    call.cancel()
    return None


async def test_storm_of_cancels_leaves_the_others_right_and_nothing_behind(api: Api) -> None:
    asked = asks()
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(ask: Ask) -> Greedy | None:
        async with gate:
            return await generate(api, ask)

    together = await asyncio.gather(*map(one, asked))
    status = await api.idle("storm")
    pairs = []
    for ask, answer in zip(asked, together, strict=True):
        if ask.leaves_after is None:
            assert answer is not None and len(answer.ids) == ask.max_tokens
            alone = await generate(api, ask)
            assert alone is not None
            pairs.append((alone, answer))
    tolerance = FACTOR * noise(pairs)
    assert [are_same(alone, answer, tolerance) for alone, answer in pairs] == [True] * (REQUESTS // 2)
    # The rule may excuse a few, not most: the noise must be far below the usual lead.
    leads = sorted(lead for alone, _ in pairs for lead in alone.leads)
    assert tolerance < leads[len(leads) // 10]
    assert (status.running_count, status.waiting_count) == (0, 0)
    assert status.kv_cache_used_token_count == status.kv_cache_idle_token_count
    assert status.counters.cached_token_count > 0
    assert status.counters.failed_sequence_count == 0
