"""A caller that leaves, whichever way, stops the work: the worker's own counters tell."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from bear_grpc.client import AsyncClient
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import WAIT_S, Api, Code, ask, collect, eventually, read_until

LONG = {"max_tokens": 1900, "ignore_eos": True}
# Most of the context: about a second of reading it, a few tokens after it.
LONG_PROMPT = "x" * 1900


@asynccontextmanager
async def cancels(api: Api, model: str, least: int = 1) -> AsyncIterator[pb.EngineCounters]:
    """The body must leave requests of the model, `least` of them after they have reached the engine.

    Gives the counters before it; afterwards the worker has seen it, and goes on.
    """
    before = await api.idle(model)
    yield before.counters

    async def seen() -> pb.ModelStatus | None:
        status = await api.idle(model)
        count = status.counters.cancelled_sequence_count - before.counters.cancelled_sequence_count
        return status if count >= least else None

    after = await eventually(seen)
    assert after is not None
    submitted, cancelled, finished, failed = (
        getattr(after.counters, f"{name}_sequence_count") - getattr(before.counters, f"{name}_sequence_count")
        for name in ("submitted", "cancelled", "finished", "failed")
    )
    assert (submitted, finished, failed) == (cancelled, 0, 0)
    assert after.running_count == after.waiting_count == 0
    assert after.kv_cache_used_token_count == after.kv_cache_idle_token_count
    assert after.worker_process_id == before.worker_process_id
    assert (await api.once(model, max_tokens=2, ignore_eos=True)).usage.completion_token_count == 2


async def reached(api: Api, model: str, before: pb.EngineCounters, count: int) -> None:
    """Waits until `count` requests more have come to the engine: they are text until then."""

    async def submitted() -> bool:
        counters = (await api.status(model)).counters
        return counters.submitted_sequence_count >= before.submitted_sequence_count + count

    await eventually(submitted)


async def running(api: Api, model: str) -> bool:
    return (await api.status(model)).running_count == 1


async def test_a_cancelled_call_stops_decoding(api: Api, steady: str) -> None:
    async with cancels(api, steady):
        call = api.generate(steady, **LONG)
        await read_until(call, "delta", 3)
        call.cancel()
    assert call.cancelled()


async def test_a_cancelled_unary_call_stops_decoding(api: Api, steady: str) -> None:
    async with cancels(api, steady):
        task = asyncio.ensure_future(api.once(steady, **LONG))
        await eventually(lambda: running(api, steady))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cancelled_call_stops_reading_its_prompt(api: Api, steady: str) -> None:
    before = await api.idle(steady)
    async with cancels(api, steady):
        call = api.generate(steady, LONG_PROMPT, max_tokens=100, ignore_eos=True)
        await read_until(call, "started")
        call.cancel()
    status = await api.status(steady)
    read = status.counters.prefill_token_count - before.counters.prefill_token_count
    assert read < len(LONG_PROMPT)


async def test_a_cancelled_call_stops_waiting(api: Api, steady: str) -> None:
    async with cancels(api, steady, 2) as before:
        first = api.generate(steady, **LONG)
        await read_until(first, "delta")
        second = api.generate(steady, **LONG)
        await reached(api, steady, before, 2)
        second.cancel()

        async def alone() -> bool:
            status = await api.status(steady)
            return status.counters.cancelled_sequence_count > before.cancelled_sequence_count

        await eventually(alone)
        status = await api.status(steady)
        assert (status.running_count, status.waiting_count) == (1, 0)
        await read_until(first, "delta")
        first.cancel()


async def test_a_deadline_takes_a_call_from_the_queue(api: Api, steady: str) -> None:
    first = api.generate(steady, **LONG)
    await read_until(first, "delta")
    call = api.inference.Generate(ask(steady, **LONG), timeout=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        await collect(call)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED  # type: ignore[attr-defined]

    async def alone() -> bool:
        status = await api.status(steady)
        return (status.running_count, status.waiting_count) == (1, 0)

    await eventually(alone)
    first.cancel()
    await api.idle(steady)


async def test_a_closed_channel_stops_the_work(api: Api, steady: str) -> None:
    async with cancels(api, steady), Api(api.target) as other:
        await read_until(other.generate(steady, **LONG), "delta")


READER = """
import sys
from bear_grpc.client import Client
with Client(sys.argv[1]) as client:
    for text in client.stream_text(sys.argv[2], "hello", max_tokens=1900, ignore_eos=True):
        print("text", flush=True)
"""


async def test_a_killed_client_stops_the_work(api: Api, steady: str) -> None:
    async with cancels(api, steady):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", READER, api.target, steady), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert await process.stdout.readline() == b"text\n"
            process.kill()
            await process.communicate()


async def test_leaving_the_clients_loop_stops_the_work(api: Api, steady: str) -> None:
    async with AsyncClient(api.target) as client, cancels(api, steady):
        async for text in client.stream_text(steady, "hello", **LONG):
            if text:
                break


async def test_an_error_in_the_clients_loop_stops_the_work(api: Api, steady: str) -> None:
    async with AsyncClient(api.target) as client, cancels(api, steady):
        with pytest.raises(ZeroDivisionError):
            async with client.generate(steady, "hello", **LONG) as stream:
                async for _ in stream:
                    raise ZeroDivisionError


async def test_a_cancelled_task_of_a_client_stops_the_work(api: Api, steady: str) -> None:
    begun = asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for _ in client.generate(steady, "hello", **LONG):
            begun.set()

    async with AsyncClient(api.target) as client, cancels(api, steady):
        task = asyncio.create_task(read(client))
        async with asyncio.timeout(WAIT_S):
            await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_many_calls_cancelled_at_once_leave_nothing_behind(api: Api, steady: str) -> None:
    async with cancels(api, steady, 50) as before:
        calls = [api.generate(steady, **LONG) for _ in range(50)]
        await reached(api, steady, before, 50)
        for call in calls:
            call.cancel()


async def test_calls_cancelled_before_they_arrive_leave_nothing_behind(api: Api, steady: str) -> None:
    for _ in range(20):
        api.generate(steady, **LONG).cancel()
    # The server may have seen some of them; none may stay.
    await api.idle(steady)
    assert (await api.once(steady, max_tokens=1)).usage.completion_token_count == 1
