"""Health whatever its watchers do: statuses count at once, and who does not read waits alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2

from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc import health
from bear_grpc.rpc.call import Call
from bear_grpc.rpc.health import NOT_SERVING, SERVING, UNKNOWN, HealthServicer
from bear_grpc.server import MAX_CONCURRENT_STREAMS, SERVICES
from tests.helpers import http2
from tests.helpers.http2 import Reluctant
from tests.helpers.rpc import WAIT_S, Api, Code, eventually, fails, serving

WATCH = "/grpc.health.v1.Health/Watch"


def request(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def told(stream: Any) -> int:
    async with asyncio.timeout(WAIT_S):
        return int((await stream.read()).status)


async def listed(api: Api) -> dict[str, int]:
    stub, pb = cast(Any, api.health), cast(Any, health_pb2)  # not in their types yet
    return {name: one.status for name, one in (await stub.List(pb.HealthListRequest())).statuses.items()}


class Watches:
    """Observer: the watches that have begun, and those of them that have ended."""

    def __init__(self) -> None:
        self.begun: list[Call] = []
        self.ended: list[Call] = []

    def begin(self, call: Call) -> None:
        if call.method == WATCH:
            self.begun.append(call)

    def end(self, call: Call) -> None:
        if call.method == WATCH:
            self.ended.append(call)


async def test_a_watcher_that_does_not_read_keeps_a_drain_from_nobody(
    tmp_path: Path, spawner: Spawner
) -> None:
    """It held the lock that a new status needed: the server stayed SERVING for all, and new watches hung."""
    async with serving(tmp_path, spawner, withdrawal_s=0.0) as (server, api), Reluctant(api.target) as lazy:
        watch = api.health.Watch(request())
        assert await told(watch) == SERVING
        for _ in range(3):
            await lazy.call(WATCH, request().SerializeToString())
        await server.drain()
        assert await api.serving("") == "NOT_SERVING"
        assert await told(watch) == NOT_SERVING
        assert await told(api.health.Watch(request())) == NOT_SERVING
        statuses = await listed(api)
        assert [statuses[name] for name in ("", *SERVICES)] == [NOT_SERVING] * (1 + len(SERVICES))
        assert statuses["liveness"] == SERVING


async def test_a_watcher_that_does_not_read_is_ended(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner, stall_timeout_s=0.1) as (server, api):
        watches = Watches()
        server.calls.add(watches)
        async with Reluctant(api.target) as lazy:
            stream = await lazy.call(WATCH, request().SerializeToString())
            reading = api.health.Watch(request("liveness"))
            assert await told(reading) == SERVING

            async def lost() -> bool:
                return watches.begun[0].reason == "SLOW_CONSUMER"

            async def gone() -> bool:
                return bool(watches.ended)

            await eventually(lost)
            assert not await gone()  # it is counted as long as gRPC keeps its status
            lazy.give(stream, 100)
            await eventually(gone)
            assert watches.ended[0].code == "RESOURCE_EXHAUSTED"
            assert not reading.done()  # one that has nothing to read is none


async def test_a_server_stops_while_a_watcher_does_not_read(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner) as (server, api), Reluctant(api.target) as lazy:
        await lazy.call(WATCH, request().SerializeToString())
        watch = api.health.Watch(request())
        assert await told(watch) == SERVING
        async with asyncio.timeout(WAIT_S):
            stopping = asyncio.create_task(server.stop(1))
            assert await told(watch) == NOT_SERVING
            await fails(watch.read(), Code.UNAVAILABLE, "DRAINING")
            await stopping


async def test_a_server_that_is_withdrawn_while_it_starts_stays_so(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner, withdrawal_s=0.0) as (server, api):
        await server.drain()
        server.health.set_serving()
        assert await api.serving("") == "NOT_SERVING"


async def test_one_connection_has_a_bounded_number_of_streams(api: Api) -> None:
    async with Reluctant(api.target) as client:
        assert client.settings[http2.MAX_CONCURRENT_STREAMS] == MAX_CONCURRENT_STREAMS


async def test_watches_are_bounded_and_a_place_is_free_again(
    tmp_path: Path, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MAX_WATCHES", 2)
    async with serving(tmp_path, spawner) as (server, api):
        seen = Watches()
        server.calls.add(seen)
        watches = [api.health.Watch(request(name)) for name in ("", "liveness")]
        for watch in watches:
            assert await told(watch) == SERVING
        status = await fails(api.health.Watch(request()).read(), Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert status.retry is not None and status.metadata["limit"] == "2"
        assert await api.serving("") == "SERVING"  # asking once is always possible
        watches[0].cancel()

        async def left() -> bool:
            return len(seen.ended) == 2

        await eventually(left)
        assert await told(api.health.Watch(request())) == SERVING


async def test_a_name_that_no_service_has_is_not_kept(api: Api) -> None:
    watch = api.health.Watch(request("x" * (health.MAX_NAME_BYTES + 1)))
    status = await fails(watch.read(), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["service"]


class Context:
    """A watch's side of a servicer: what it was told, as fast as the test lets it read."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.may_read = asyncio.Event()
        self.may_read.set()

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        await self.may_read.wait()
        self.told.append(message.status)

    async def send_initial_metadata(self, metadata: object) -> None:
        pass

    def peer(self) -> str:
        return "ipv4:10.0.0.1:50000"


async def test_a_watch_tells_changes_only_and_the_newest_to_who_comes_late() -> None:
    servicer, context = HealthServicer(WAIT_S), Context()
    watch = asyncio.create_task(servicer.Watch(request("a"), context))

    async def until(*statuses: int) -> None:
        async def so() -> bool:
            return context.told == [*statuses]

        await eventually(so)

    await until(UNKNOWN)
    servicer.set("b", SERVING)
    servicer.set("a", SERVING)
    await until(UNKNOWN, SERVING)
    context.may_read.clear()
    servicer.set("a", SERVING)
    servicer.set("a", NOT_SERVING)
    await asyncio.sleep(0)  # a message is under way
    await asyncio.sleep(0)
    servicer.set("a", SERVING)
    servicer.remove("a")
    context.may_read.set()
    await until(UNKNOWN, SERVING, NOT_SERVING, UNKNOWN)
    servicer.set("a", NOT_SERVING)
    await until(UNKNOWN, SERVING, NOT_SERVING, UNKNOWN, NOT_SERVING)
    watch.cancel()
    await asyncio.wait([watch])
    assert servicer._watches == {}


async def test_check_of_a_name_that_nobody_knows_is_not_found_without_a_reason(api: Api) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await api.serving("nobody")
    assert caught.value.code() is Code.NOT_FOUND
