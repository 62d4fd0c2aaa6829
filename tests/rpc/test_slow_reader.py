"""A client that does not read holds up neither the worker nor the others; its ending waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bear_grpc.errors import SlowConsumer
from bear_grpc.executor.spawner import Spawner
from bear_grpc.params import PromptInput, SamplingParams, StopParams
from bear_grpc.protocol import INITIAL_CREDIT_TOKENS, Delta, Finished
from bear_grpc.server import Server
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import WAIT_S, Api, Code, eventually, read_until, serving, stream_fails

STALL_S = 0.3
# A reader whose window is small: the server's writes block after some 25 kB.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)]
SAMPLING = SamplingParams(temperature=0.0, repetition_penalty=1.0)
MANY = StopParams(max_tokens=1900, ignore_eos=True)


@pytest.fixture(scope="module")
async def impatient(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, tiny_file: Path
) -> AsyncIterator[tuple[Server, Api]]:
    """A server with a short stall time, and a model with two slots."""
    folder = tmp_path_factory.mktemp("impatient")
    settings = {"allow_path": [tiny_file.parent], "stall_timeout_s": STALL_S}
    async with serving(folder, spawner, **settings) as (server, api):
        await api.register("tiny", tiny_file, load_options=pb.LoadOptions(threads=1, max_sequences=2))
        await api.load("tiny")
        yield server, api


async def failed(api: Api) -> int:
    return (await api.status("tiny")).counters.failed_sequence_count


async def test_a_generation_that_nobody_reads_stops_at_its_credit_and_ends_slow_consumer(
    impatient: tuple[Server, Api],
) -> None:
    server, api = impatient
    executor = await server.manager.executor("tiny")
    before = await api.idle("tiny")
    generation = executor.generate(PromptInput("hello"), SAMPLING, MANY)
    try:

        async def ended() -> bool:
            return generation.ended

        await eventually(ended)
        status = await api.status("tiny")
        drawn = status.counters.decode_token_count - before.counters.decode_token_count
        assert drawn == INITIAL_CREDIT_TOKENS
        assert status.counters.failed_sequence_count == before.counters.failed_sequence_count + 1
        # What was drawn is still read, then the error.
        count = 0
        with pytest.raises(SlowConsumer):
            async for _, event in generation:
                assert not isinstance(event, Finished)
                count += event.count if isinstance(event, Delta) else 0
        assert count == INITIAL_CREDIT_TOKENS
    finally:
        generation.close()


async def test_a_reader_that_reads_slowly_but_reads_gets_everything(impatient: tuple[Server, Api]) -> None:
    server, _ = impatient
    executor = await server.manager.executor("tiny")
    generation = executor.generate(PromptInput("hello"), SAMPLING, MANY)
    count = 0
    async with asyncio.timeout(WAIT_S):
        async for _, event in generation:
            if isinstance(event, Delta):
                count += event.count
                # Each stop is shorter than the stall time, all together are longer.
                await asyncio.sleep(STALL_S / 10)
    assert count == 1900
    assert isinstance(event, Finished)


async def test_a_client_that_does_not_read_loses_its_slot_and_gets_its_ending_later(
    impatient: tuple[Server, Api],
) -> None:
    _, api = impatient
    before = await failed(api)
    async with Api(api.target, SMALL_WINDOW) as lazy:
        # Long ids make long messages: few of them fill the window.
        options = {"max_tokens": 1900, "ignore_eos": True, "return_token_ids": True, "request_id": "x" * 120}
        call = lazy.generate("tiny", "hello", **options)
        await read_until(call, "delta")
        # Meanwhile the other slot serves.
        assert (await api.once("tiny", max_tokens=400, ignore_eos=True)).usage.completion_token_count == 400

        async def lost() -> bool:
            return await failed(api) == before + 1

        await eventually(lost)
        assert (await api.idle("tiny")).running_count == 0
        seen, status = await stream_fails(call, Code.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
        assert float(status.metadata["stalled_seconds"]) == STALL_S
        assert 0 < sum(len(event.delta.tokens) for event in seen) < 1900
        assert not any(event.HasField("completed") for event in seen)


async def test_a_client_that_does_not_read_can_be_cancelled(impatient: tuple[Server, Api]) -> None:
    _, api = impatient
    async with Api(api.target, SMALL_WINDOW) as lazy:
        options = {"max_tokens": 1900, "ignore_eos": True, "return_token_ids": True, "request_id": "y" * 120}
        call = lazy.generate("tiny", "hello", **options)
        await read_until(call, "delta")
        call.cancel()
    await api.idle("tiny")

    async def free() -> bool:
        try:
            answer = await api.once("tiny", max_tokens=1, request_id="y" * 120)
        except Exception:
            return False
        return answer.usage.completion_token_count == 1

    await eventually(free)
