"""GetLoad, WatchLoad and ORCA of a server that works."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.call import Call
from bear_grpc.rpc.orca_messages import METHOD, SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import model_service_pb2_grpc as models_grpc
from bear_grpc.v1 import server_service_pb2 as pb
from bear_grpc.v1 import types_pb2 as types_pb
from tests.helpers.rpc import WAIT_S, Api, Code, eventually, fails, read_until, serving

LONG = {"max_tokens": 1900, "ignore_eos": True}
ONE = types_pb.LoadOptions(threads=1, max_sequences=1)


def watch(api: Api, interval_ms: int = 100) -> Any:
    request = pb.WatchLoadRequest()
    request.interval.FromMilliseconds(interval_ms)
    return api.server.WatchLoad(request)


async def load(api: Api) -> pb.ServerLoad:
    return (await api.server.GetLoad(pb.GetLoadRequest())).load


def reports(api: Api) -> Any:
    """An ORCA stream of one server."""
    call = api.channel.unary_stream(
        f"/{SERVICE}/{METHOD}", OrcaLoadReportRequest.SerializeToString, OrcaLoadReport.FromString
    )
    return call(OrcaLoadReportRequest())


async def until(stream: Any, check: Any) -> Any:
    """The first message of a stream that passes the check."""
    async with asyncio.timeout(WAIT_S):
        while True:
            message = await stream.read()
            assert message is not grpc.aio.EOF
            if check(message):
                return message


@pytest.fixture
async def busy_server(tmp_path: Path, spawner: Spawner, steady_file: Path) -> Any:
    async with serving(tmp_path, spawner, allow_path=[steady_file.parent]) as (server, api):
        await api.register("steady", steady_file, load_options=ONE)
        await api.load("steady")
        yield server, api


async def test_load_of_a_server_without_models_is_none(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner) as (_, api):
        assert await load(api) == pb.ServerLoad()


async def test_load_tells_what_runs_and_waits(busy_server: Any) -> None:
    _, api = busy_server
    idle = await load(api)
    assert [model.name for model in idle.models] == ["steady"]
    assert (idle.slot_count, idle.running_count, idle.waiting_count, idle.utilization) == (1, 0, 0, 0)
    assert idle.memory_bytes > 1 << 20 and idle.kv_cache_token_count > 0
    running = api.generate("steady", **LONG)
    await read_until(running, "delta", 3)
    waiting = [api.generate("steady", "a b c d", **LONG) for _ in range(2)]

    async def both_wait() -> pb.ServerLoad | None:
        found = await load(api)
        return found if found.waiting_token_count and found.waiting_count == 2 else None

    found = await eventually(both_wait)
    assert found is not None
    (model,) = found.models
    assert (found.running_count, model.running_count, model.waiting_count) == (1, 1, 2)
    assert found.utilization == model.utilization == 3
    assert model.kv_cache_used_token_count > 0 and model.waiting_token_count >= 2
    assert model.decode_tokens_per_second == found.tokens_per_second > 0
    for call in (running, *waiting):
        call.cancel()
    await api.idle("steady")
    assert (await load(api)).utilization == 0

    async def counted() -> bool:  # when it has ended, and those that never ran are none
        return (await load(api)).requests_per_second > 0

    await eventually(counted)


async def test_watched_load_follows_and_ends_with_the_server(busy_server: Any) -> None:
    server, api = busy_server
    watching, balancing = watch(api), reports(api)
    first = (await watching.read()).load
    assert first.running_count == 0
    assert (await balancing.read()).application_utilization < 0.1
    running = api.generate("steady", **LONG)
    await read_until(running, "delta")
    seen = await until(watching, lambda message: message.load.running_count)
    assert seen.load.utilization == 1
    report = await until(balancing, lambda message: message.named_metrics["running"])
    assert report.application_utilization == 1 and report.utilization["slots"] == 1
    running.cancel()
    await api.idle("steady")
    await until(watching, lambda message: not message.load.running_count)
    stopping = asyncio.create_task(server.stop(5))
    for stream in (watching, balancing):
        await fails(until(stream, lambda message: False), Code.UNAVAILABLE, "DRAINING")
    await stopping


async def test_nothing_is_read_while_nobody_watches(busy_server: Any, monkeypatch: Any) -> None:
    server, api = busy_server
    reads = 0
    original = server.load.read

    async def counted() -> Any:
        nonlocal reads
        reads += 1
        return await original()

    monkeypatch.setattr(server.load, "read", counted)
    watching = watch(api)
    await watching.read()
    await watching.read()
    watching.cancel()

    async def quiet() -> bool:
        before = reads
        await asyncio.sleep(0.3)  # three intervals
        return reads == before

    await eventually(quiet)


class Counting:
    """Observer: how often a method was called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def begin(self, call: Call) -> None:
        self.calls[call.method.rpartition("/")[2]] += 1

    def end(self, call: Call) -> None:
        pass


async def test_balancer_sends_more_to_the_server_that_has_less_to_do(
    tmp_path: Path, spawner: Spawner, steady_file: Path
) -> None:
    """gRPC's own weighted_round_robin, told out of band."""
    settings: dict[str, Any] = {"listen": ["127.0.0.1:0"], "allow_path": [steady_file.parent]}
    async with (
        serving(tmp_path / "one", spawner, **settings) as (busy, busy_api),
        serving(tmp_path / "two", spawner, **settings) as (idle, idle_api),
    ):
        counts = Counting(), Counting()
        for server, api, count in ((busy, busy_api, counts[0]), (idle, idle_api, counts[1])):
            server.calls.add(count)
            await api.register("steady", steady_file, load_options=ONE)
        await busy_api.load("steady")
        calls = [busy_api.generate("steady", **LONG) for _ in range(4)]
        await read_until(calls[0], "delta")
        config = {
            "loadBalancingConfig": [
                {
                    "weighted_round_robin": {
                        "enableOobLoadReport": True,
                        "oobReportingPeriod": "1s",
                        "blackoutPeriod": "0s",
                        "weightUpdatePeriod": "0.1s",
                    }
                }
            ]
        }
        options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1)]
        target = f"ipv4:{busy.addresses[0]},{idle.addresses[0]}"
        async with grpc.aio.insecure_channel(target, options) as channel:
            stub = models_grpc.ModelServiceStub(channel)

            async def balanced() -> bool:
                before = [count.calls["GetModel"] for count in counts]
                for _ in range(40):
                    await stub.GetModel(models_pb.GetModelRequest(name="steady"))
                ours, theirs = (
                    count.calls["GetModel"] - old for count, old in zip(counts, before, strict=True)
                )
                assert ours + theirs == 40
                return ours <= 8

            await eventually(balanced)
        for call in calls:
            call.cancel()
        assert all(count.calls[METHOD] == 1 for count in counts)
