"""The asyncio client against a real server."""

from __future__ import annotations

import asyncio

import pytest

from bear_grpc.client import AsyncClient, CallCancelled
from bear_grpc.v1 import inference_service_pb2 as inference
from tests.client.fake_server import WAIT_S, FakeServer


async def seen(server: FakeServer) -> bool:
    """Whether the server saw a cancelled call."""
    return await asyncio.to_thread(server.cancelled.wait, WAIT_S)


async def test_generate_yields_the_events(server: FakeServer, async_client: AsyncClient) -> None:
    kinds = [event.WhichOneof("event") async for event in async_client.generate("m", "p", temperature=0)]
    assert kinds == ["started", "delta", "delta", "delta", "completed"]
    assert server.last(inference.GenerateRequest).sampling.HasField("temperature")


async def test_stream_text_yields_what_is_not_empty(async_client: AsyncClient) -> None:
    assert [text async for text in async_client.stream_text("m", "p")] == ["Hel", "lo"]


async def test_unary_calls(async_client: AsyncClient) -> None:
    assert (await async_client.generate_once("m", "p")).choices[0].text == "Hello"
    assert (await async_client.server_info()).core_count == 2
    assert [model.name async for model in async_client.list_models()] == ["bear-demo", "plain"]


async def test_pull_model_and_its_companions(server: FakeServer, async_client: AsyncClient) -> None:
    kinds = [event.WhichOneof("event") async for event in async_client.pull_model("tiny")]
    assert kinds[-1] == "completed"
    assert (await async_client.cancel_pull("tiny")).kept_bytes > 0
    assert len((await async_client.prune_models(dry_run=True)).files) == 2
    assert (await async_client.estimate_memory("tiny", context_length=512)).fits
    assert (await async_client.get_model("demo", include_tensors=True)).tensors


async def test_breaking_out_of_a_stream_cancels_the_call(
    server: FakeServer, async_client: AsyncClient
) -> None:
    server.endless = True
    async for _ in async_client.stream_text("m", "p"):
        break
    assert await seen(server)


async def test_leaving_the_context_of_a_stream_cancels_the_call(
    server: FakeServer, async_client: AsyncClient
) -> None:
    server.endless = True
    async with async_client.generate("m", "p") as events:
        await anext(events)
    assert await seen(server)


async def test_cancelling_the_reading_task_cancels_the_call(
    server: FakeServer, async_client: AsyncClient
) -> None:
    server.endless = True
    started = asyncio.Event()

    async def read() -> None:
        async for _ in async_client.generate("m", "p"):
            started.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(started.wait(), WAIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await seen(server)


async def test_cancel_from_another_task_wakes_the_reader_with_our_error(
    server: FakeServer, async_client: AsyncClient
) -> None:
    server.endless = True
    events = async_client.generate("m", "p")
    await anext(events)

    async def read() -> None:
        async for _ in events:
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0)  # one turn: the reader begins
    events.cancel()
    with pytest.raises(CallCancelled):
        await task
    assert await seen(server)


async def test_a_unix_socket_is_a_target(unix_server: FakeServer) -> None:
    async with AsyncClient(unix_server.target, timeout=WAIT_S) as client:
        assert (await client.server_info()).version == "0.1.0"
