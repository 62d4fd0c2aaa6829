"""Traces as a collector gets them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1 import trace_pb2

from bear_grpc.config import ConfigError, ServerConfig
from bear_grpc.executor.spawner import Spawner
from bear_grpc.server import Server
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from tests.helpers.collector import Collector, attributes, collecting
from tests.helpers.rpc import Api, Code, ask, collect, eventually, fails, read_until, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"))
NOT_SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
LONG = {"max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as found:
        yield found


@pytest.fixture(scope="module")
async def traced(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, steady_file: Path, collector: Collector
) -> AsyncIterator[Api]:
    folder = tmp_path_factory.mktemp("traces")
    settings = {"allow_path": [steady_file.parent], "otlp_endpoint": collector.endpoint}
    async with serving(folder, spawner, **settings) as (_, api):
        await api.register("steady", steady_file)
        await api.load("steady")
        yield api


@pytest.fixture(autouse=True)
def fresh(collector: Collector) -> None:
    collector.spans.clear()


async def test_generation_is_a_span_with_its_phases_under_the_callers(
    traced: Api, collector: Collector
) -> None:
    began = time.time_ns()
    request = ask("steady", max_tokens=8, ignore_eos=True, request_id="mine")
    events = await collect(traced.inference.Generate(request, metadata=SAMPLED))
    ended = time.time_ns()
    span = await collector.of("InferenceService/Generate")
    usage = events[-1].completed.usage
    assert span.name == "bear_grpc.v1.InferenceService/Generate"
    assert span.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.trace_state == "vendor=1"
    assert span.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    told = attributes(span)
    assert told.pop("gen_ai.response.time_to_first_chunk") > 0
    assert told == {
        "rpc.system": "grpc",
        "rpc.system.name": "grpc",
        "rpc.service": "bear_grpc.v1.InferenceService",
        "rpc.method": "Generate",
        "rpc.grpc.status_code": 0,
        "rpc.response.status_code": "OK",
        "network.peer.address": "unix:",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "bear_grpc",
        "gen_ai.request.model": "steady",
        "gen_ai.response.model": "steady",
        "gen_ai.response.id": "mine",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage.prompt_token_count,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_token_count,
        "gen_ai.usage.output_tokens": 8,
    }
    phases = collector.children(span)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert attributes(phases[2])["gen_ai.usage.output_tokens"] == 8
    edges = [span.start_time_unix_nano]
    for phase in phases:
        assert phase.trace_id.hex() == TRACE
        edges += [phase.start_time_unix_nano, phase.end_time_unix_nano]
    edges.append(span.end_time_unix_nano)
    assert edges == sorted(edges)
    slack = 1_000_000  # two clocks are read one after the other
    assert began - slack <= edges[0] and edges[-1] <= ended + slack
    assert collector.resources[-1]["service.name"] == "bear-grpc"


async def test_caller_decides_whether_its_trace_is_sampled(traced: Api, collector: Collector) -> None:
    request = ask("steady", max_tokens=2)
    once = inference_pb.GenerateOnceRequest(request=request)
    await traced.inference.GenerateOnce(once, metadata=NOT_SAMPLED)
    await collect(traced.inference.Generate(request))
    await collector.of("Generate")  # they are sent in order
    assert collector.named("GenerateOnce") == []


async def test_trace_headers_that_are_wrong_begin_a_new_trace(traced: Api, collector: Collector) -> None:
    metadata = (("traceparent", "00-nonsense-01"), ("tracestate", "=,="))
    await collect(traced.inference.Generate(ask("steady", max_tokens=2), metadata=metadata))
    span = await collector.of("Generate")
    assert span.parent_span_id == b"" and span.trace_id.hex() != TRACE


async def test_error_of_the_callers_is_told_and_no_error_of_the_server(
    traced: Api, collector: Collector
) -> None:
    await fails(traced.once("nobody"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    span = await collector.of("GenerateOnce")
    told = attributes(span)
    assert (told["error.type"], told["rpc.grpc.status_code"]) == ("MODEL_NOT_FOUND", 5)
    assert span.status.code == trace_pb2.Status.STATUS_CODE_UNSET


async def test_cancelled_call_tells_how_long_it_waited(traced: Api, collector: Collector) -> None:
    stream = traced.generate("steady", **LONG)
    await read_until(stream, "started")
    stream.cancel()
    span = await collector.of("Generate")
    assert attributes(span)["rpc.response.status_code"] == "CANCELLED"
    assert [child.name for child in collector.children(span)] == ["queue"]


async def test_load_that_a_call_waits_for_is_a_phase(traced: Api, collector: Collector) -> None:
    await traced.unload("steady")
    await collect(traced.generate("steady", max_tokens=2))
    span = await collector.of("InferenceService/Generate")
    phases = [child.name for child in collector.children(span)]
    assert phases == ["load", "queue", "prefill", "decode"]


async def test_worker_that_dies_is_an_event_and_its_failures_are_errors(
    traced: Api, collector: Collector
) -> None:
    running = traced.generate("steady", max_tokens=100, ignore_eos=True)
    cut = traced.generate("steady", fail_on_restart=True, **LONG)
    await read_until(running, "delta")
    await read_until(cut, "delta")
    os.kill((await traced.status("steady")).worker_process_id, signal.SIGKILL)
    await collect(running)

    async def both() -> bool:
        return len(collector.named("Generate")) == 2

    await eventually(both)
    died, went_on = sorted(collector.named("Generate"), key=lambda span: span.end_time_unix_nano)
    assert died.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert died.status.message == "WORKER_CRASHED"
    assert [event.name for event in went_on.events] == ["worker died"]
    assert went_on.start_time_unix_nano < went_on.events[0].time_unix_nano < went_on.end_time_unix_nano


async def test_health_checks_leave_no_spans(traced: Api, collector: Collector) -> None:
    await traced.serving("")
    await collect(traced.generate("steady", max_tokens=2))
    await collector.of("Generate")
    assert collector.named("Check") == []


async def test_stop_sends_what_is_left(
    tmp_path: Path, spawner: Spawner, steady_file: Path, collector: Collector
) -> None:
    async with serving(tmp_path, spawner, otlp_endpoint=collector.endpoint) as (server, api):
        await fails(api.once("nobody"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
        await server.stop(5)
    assert collector.named("GenerateOnce")


async def test_collector_that_does_not_answer_holds_up_nobody(tmp_path: Path, spawner: Spawner) -> None:
    async with collecting() as deaf:
        deaf.is_deaf = True
        async with serving(tmp_path, spawner, otlp_endpoint=deaf.endpoint) as (server, api):
            await fails(api.once("nobody"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
            began = time.monotonic()
            await server.stop(0)
            assert time.monotonic() - began < 4  # its own export would take longer


async def test_no_ratio_leaves_new_traces_out(tmp_path: Path, spawner: Spawner, collector: Collector) -> None:
    settings = {"otlp_endpoint": collector.endpoint, "trace_sample_ratio": 0.0}
    async with serving(tmp_path, spawner, **settings) as (server, api):
        await fails(api.once("nobody"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
        await server.stop(5)
    assert collector.spans == []


async def test_without_opentelemetry_the_server_does_not_start_and_says_what_is_needed(
    tmp_path: Path, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    config = ServerConfig(
        listen=[f"unix:{tmp_path}/bear.sock"], models_dir=tmp_path, otlp_endpoint="http://127.0.0.1:4317"
    )
    server = Server(config, spawner)
    with pytest.raises(ConfigError, match=r"otlp_endpoint.*pip install 'bear-grpc\[otel\]'"):
        await server.start()
    await server.stop(0)
