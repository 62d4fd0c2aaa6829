"""A server that is withdrawn: what is refused, what ends, and what goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from bear_grpc.executor.spawner import Spawner
from bear_grpc.server import Server
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import server_service_pb2 as server_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import (
    WAIT_S,
    Api,
    Code,
    collect,
    eventually,
    fails,
    kinds,
    read_until,
    serving,
    stream_fails,
)

HOUR_S = 3600.0


@pytest.fixture
async def withdrawn(
    tmp_path: Path, spawner: Spawner, steady_file: Path, pause_s: float
) -> AsyncIterator[tuple[Server, Api]]:
    """A server of the test's own with the slow model registered; `pause_s` is its withdrawal's."""
    settings = {"allow_path": [steady_file.parent], "withdrawal_s": pause_s}
    async with serving(tmp_path, spawner, **settings) as (server, api):
        options = pb.LoadOptions(threads=1, max_sequences=1)
        await api.register("steady", steady_file, load_options=options)
        yield server, api


@pytest.fixture
def pause_s() -> float:
    return 0.0


async def drain(api: Api) -> int:
    async with asyncio.timeout(WAIT_S):
        return (await api.server.Drain(server_pb.DrainRequest())).remaining_count


async def test_what_runs_finishes_what_waits_and_what_comes_is_told_draining(
    withdrawn: tuple[Server, Api],
) -> None:
    _, api = withdrawn
    await api.load("steady")
    running = api.generate("steady", max_tokens=300, ignore_eos=True)
    await read_until(running, "delta")
    waiting = [api.generate("steady", max_tokens=4) for _ in range(3)]

    async def queued() -> bool:
        return (await api.status("steady")).waiting_count == 3

    await eventually(queued)
    assert await drain(api) >= 1
    for call in waiting:
        seen, status = await stream_fails(call, Code.UNAVAILABLE, "DRAINING")
        assert seen == []
        assert status.retry is not None
        # Nothing but trailers: a client may try it elsewhere.
        assert not [key for key, _ in await call.initial_metadata()]
    assert (await fails(api.once("steady"), Code.UNAVAILABLE, "DRAINING")).retry is not None
    events = await collect(running)
    assert kinds(events)[-1] == "completed"
    assert events[-1].completed.usage.completion_token_count == 300

    async def finished() -> bool:
        return await drain(api) == 0

    await eventually(finished)
    assert [await api.serving(name) for name in ("", "liveness")] == ["NOT_SERVING", "SERVING"]


@pytest.mark.parametrize("pause_s", [HOUR_S])
async def test_calls_are_taken_until_the_pause_is_over_and_a_stop_does_not_wait_for_it(
    withdrawn: tuple[Server, Api],
) -> None:
    server, api = withdrawn
    await api.load("steady")
    watch = api.health.Watch(health_pb2.HealthCheckRequest(service="models/steady"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    draining = asyncio.create_task(drain(api))
    async with asyncio.timeout(WAIT_S):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await api.once("steady", max_tokens=2, ignore_eos=True)).usage.completion_token_count == 2
    assert not draining.done()
    async with asyncio.timeout(WAIT_S):
        await server.stop(0)
    # Its pause was cut: an answer or the end of the connection, but an ending.
    await asyncio.wait([draining], timeout=WAIT_S)
    assert draining.done()
    draining.exception()


async def test_who_waits_for_a_load_is_told_draining(withdrawn: tuple[Server, Api]) -> None:
    _, api = withdrawn
    calls = [api.load("steady"), asyncio.ensure_future(api.once("steady"))]
    worker = await api.loading("steady")
    os.kill(worker, signal.SIGSTOP)
    await drain(api)
    for call in calls:
        await fails(call, Code.UNAVAILABLE, "DRAINING")


async def test_watches_go_on_until_the_stop_and_end_with_a_status(withdrawn: tuple[Server, Api]) -> None:
    server, api = withdrawn
    watch = api.models.WatchModels(models_pb.WatchModelsRequest(names=["steady"]))
    assert (await watch.read()).status.state == pb.MODEL_STATE_AVAILABLE
    health = api.health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
    await health.read()
    await drain(api)
    # A model's change still reaches them.
    await api.delete("steady")
    async with asyncio.timeout(WAIT_S):
        assert (await watch.read()).status.state == pb.MODEL_STATE_ABSENT
    stopping = asyncio.create_task(server.stop(0))
    for call in (watch, health):
        _, status = await stream_fails(call, Code.UNAVAILABLE, "DRAINING")
        assert status.retry is not None
    await stopping


async def test_no_download_begins(withdrawn: tuple[Server, Api]) -> None:
    _, api = withdrawn
    await drain(api)
    call = api.models.PullModel(models_pb.PullModelRequest(name="phi-2"))
    assert (await stream_fails(call, Code.UNAVAILABLE, "DRAINING"))[0] == []


async def test_a_reader_that_is_behind_still_gets_its_last_messages(withdrawn: tuple[Server, Api]) -> None:
    server, api = withdrawn
    await api.load("steady")
    call = api.generate("steady", max_tokens=60, ignore_eos=True)
    await read_until(call, "delta")
    stopping = asyncio.create_task(server.stop(WAIT_S))
    with pytest.raises(grpc.RpcError):
        await eventually(lambda: _refused(api))
    assert kinds(await collect(call))[-1] == "completed"
    async with asyncio.timeout(WAIT_S):
        await stopping


async def _refused(api: Api) -> bool:
    await api.once("steady", max_tokens=1)
    return False
