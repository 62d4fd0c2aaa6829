"""Metrics of a running server: what a scrape tells of calls, generations, models and downloads."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from bear_grpc.config import ConfigError
from bear_grpc.errors import PullCancelled
from bear_grpc.executor.spawner import Spawner
from bear_grpc.protocol import DeviceInfo
from bear_grpc.rpc.call import Call
from bear_grpc.server import Server
from bear_grpc.telemetry import families
from bear_grpc.telemetry.call_metrics import MAX_MODELS, OTHER, CallMetrics
from bear_grpc.telemetry.scrape import MAX_CONNECTIONS
from bear_grpc.telemetry.slow import FRESH_S, SlowReadings
from bear_grpc.types import HubSource, PullProgress, PullStage
from tests.helpers.http import get
from tests.helpers.rpc import Api, Code, collect, eventually, fails, read_until, serving

OPEN_METRICS = "application/openmetrics-text;version=1.0.0;q=0.9,text/plain;q=0.5"
GENERATE = "Generate"
Page = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(scope="module")
async def measured(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, tiny_file: Path
) -> AsyncIterator[tuple[Server, Api]]:
    folder = tmp_path_factory.mktemp("metrics")
    settings = {"allow_path": [tiny_file.parent], "metrics_listen": "127.0.0.1:0"}
    async with serving(folder, spawner, **settings) as (server, api):
        await api.register("tiny", tiny_file)
        await api.load("tiny")
        yield server, api


async def scrape(server: Server, accept: str = "") -> Page:
    """All samples by name."""
    assert server.metrics is not None
    status, _, body = await get(server.metrics.address, "/metrics", accept)
    assert status == 200
    parse = parse_open if accept else parse_plain
    page: Page = {}
    for family in parse(body):
        for sample in family.samples:
            page.setdefault(sample.name, []).append((sample.labels, sample.value))
    return page


def value(page: Page, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    found = [number for told, number in page.get(name, []) if labels.items() <= told.items()]
    return sum(found)


async def test_generation_is_told_by_all_its_measures(measured: tuple[Server, Api]) -> None:
    server, api = measured
    before = await scrape(server)
    events = await collect(api.generate("tiny", max_tokens=6, ignore_eos=True))
    usage = events[-1].completed.usage

    async def ended() -> Page | None:
        page = await scrape(server)
        name, labels = "gen_ai_server_request_duration_seconds_count", {"gen_ai_request_model": "tiny"}
        return page if value(page, name, **labels) > value(before, name, **labels) else None

    after = await eventually(ended)
    assert after is not None

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    gen_ai = {"gen_ai_operation_name": "text_completion", "gen_ai_provider_name": "bear_grpc"}
    gen_ai["gen_ai_request_model"] = "tiny"
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "request_duration_seconds"):
        assert grown(f"gen_ai_server_{name}_count", **gen_ai) == 1, name
        assert grown(f"gen_ai_server_{name}_sum", **gen_ai) > 0, name
    assert grown("gen_ai_client_token_usage_sum", gen_ai_token_type="output", **gen_ai) == 6
    prompt = usage.prompt_token_count
    assert grown("gen_ai_client_token_usage_sum", gen_ai_token_type="input", **gen_ai) == prompt
    pieces = sum(event.HasField("delta") for event in events)
    assert grown("bear_inter_token_gap_seconds_count", model="tiny") >= pieces - 1
    for name in ("queue_seconds", "prefill_tokens_per_second", "decode_tokens_per_second"):
        assert grown(f"bear_{name}_count", model="tiny") == 1, name
    assert grown("bear_tokens_total", model="tiny", kind="prompt") == prompt
    assert grown("bear_tokens_total", model="tiny", kind="completion") == 6
    assert grown("bear_answers_total", model="tiny", finish_reason="length") == 1
    call = {"service": "bear_grpc.v1.InferenceService", "method": GENERATE}
    assert grown("bear_rpc_calls_total", code="OK", **call) == 1
    assert value(after, "bear_rpc_in_flight", **call) == 0


async def test_error_counts_by_code_and_reason_and_names_no_model(measured: tuple[Server, Api]) -> None:
    server, api = measured
    await fails(api.once("no-such-model"), Code.NOT_FOUND, "MODEL_NOT_FOUND")

    async def counted() -> bool:
        labels = {"method": "GenerateOnce", "code": "NOT_FOUND", "reason": "MODEL_NOT_FOUND"}
        return value(await scrape(server), "bear_rpc_calls_total", **labels) == 1

    await eventually(counted)
    assert server.metrics is not None
    assert "no-such-model" not in (await get(server.metrics.address, "/metrics"))[2]


async def test_running_stream_is_in_flight_and_running_and_then_cancelled(
    measured: tuple[Server, Api],
) -> None:
    server, api = measured
    stream = api.generate("tiny", max_tokens=1900, ignore_eos=True)
    await read_until(stream, "delta")

    async def running() -> Page | None:
        page = await scrape(server)
        return page if value(page, "bear_sequences_running", model="tiny") == 1 else None

    page = await eventually(running)
    assert page is not None
    assert value(page, "bear_rpc_in_flight", method=GENERATE) == 1
    stream.cancel()

    async def cancelled() -> bool:
        found = await scrape(server)
        told = value(found, "gen_ai_server_request_duration_seconds_count", error_type="CANCELLED")
        return told == 1 and value(found, "bear_rpc_in_flight", method=GENERATE) == 0

    drawn = value(page, "bear_tokens_total", kind="completion")
    await eventually(cancelled)
    assert value(await scrape(server), "bear_tokens_total", kind="completion") > drawn


async def test_loaded_model_is_told_with_engine_and_memory(measured: tuple[Server, Api]) -> None:
    server, api = measured
    await api.once("tiny", max_tokens=2)
    await api.idle("tiny")
    assert server.metrics is not None
    await server.metrics.slow.read()
    page = await scrape(server)
    status = await api.status("tiny")
    assert value(page, "bear_models", state="ready") == 1
    assert value(page, "bear_model_loads_total", model="tiny", outcome="ready") == 1
    assert value(page, "bear_kv_cache_tokens", model="tiny") == status.kv_cache_token_count
    assert value(page, "bear_kv_cache_used_tokens", model="tiny") == status.kv_cache_used_token_count
    for kind in ("weights", "kv_cache", "compute", "overhead"):
        assert value(page, "bear_model_memory_bytes", model="tiny", kind=kind) > 0, kind
    assert value(page, "bear_worker_memory_bytes", model="tiny") > 1e6
    assert value(page, "bear_engine_tokens_total", model="tiny", phase="prefill") > 0
    assert value(page, "bear_info") == 1
    assert value(page, "process_resident_memory_bytes") > 1e6


async def test_both_formats_tell_every_metric_and_the_same(measured: tuple[Server, Api]) -> None:
    server, api = measured
    await api.once("tiny", max_tokens=3, ignore_eos=True)
    await api.idle("tiny")
    assert server.metrics is not None
    texts = []
    for accept, kind in (("", "text/plain"), (OPEN_METRICS, "application/openmetrics-text")):
        status, headers, body = await get(server.metrics.address, "/metrics", accept)
        assert status == 200 and headers["content-type"].startswith(kind)
        texts.append(body)
    plain = {family.name: family for family in parse_plain(texts[0])}
    opened = {family.name: family for family in parse_open(texts[1])}
    assert plain.keys() == opened.keys()
    assert {name.removesuffix("_total") for name in families.FAMILIES} == plain.keys()
    for name in ("bear_rpc_calls", "bear_kv_cache_tokens"):
        assert {str(s[:2]) for s in plain[name].samples} == {str(s[:2]) for s in opened[name].samples}
    for name, family in plain.items():
        metric = families.FAMILIES.get(name) or families.FAMILIES[f"{name}_total"]
        assert family.type == metric.kind.value
        assert {sample.name for sample in family.samples} <= set(metric.sample_names)
        allowed = {*metric.labels, "le"}
        assert all(sample.labels.keys() <= allowed for sample in family.samples)


async def test_worker_that_dies_is_a_restart(tmp_path: Path, spawner: Spawner, tiny_file: Path) -> None:
    settings = {"allow_path": [tiny_file.parent], "metrics_listen": "127.0.0.1:0"}
    async with serving(tmp_path, spawner, **settings) as (server, api):
        await api.register("tiny", tiny_file)
        await api.load("tiny")
        entry = server.shelf.get("tiny")
        assert entry.executor is not None
        os.kill(entry.executor.pid, signal.SIGKILL)

        async def restarted() -> bool:
            page = await scrape(server)
            loads = value(page, "bear_model_loads_total", model="tiny", outcome="ready")
            return (value(page, "bear_worker_restarts_total", model="tiny"), loads) == (1, 2)

        await eventually(restarted)


async def test_download_under_way_is_told_and_a_forgotten_model_is_not(measured: tuple[Server, Api]) -> None:
    server, _ = measured
    shelf = server.shelf
    shelf.announce("someone/model", HubSource("someone/model", "m.gguf"))
    shelf.set_pull("someone/model", PullProgress(PullStage.DOWNLOADING, 30, 100, 7.0))
    page = await scrape(server)
    told = [
        value(page, f"bear_pull_{name}", model="someone/model")
        for name in ("completed_bytes", "size_bytes", "bytes_per_second")
    ]
    assert told == [30, 100, 7]
    shelf.set_pull("someone/model", None, PullCancelled("someone/model"))
    assert server.metrics is not None
    assert "someone/model" not in (await get(server.metrics.address, "/metrics"))[2]


async def test_other_paths_and_methods_and_nonsense_are_refused(measured: tuple[Server, Api]) -> None:
    server, _ = measured
    assert server.metrics is not None
    address = server.metrics.address
    assert (await get(address, "/"))[0] == 200
    assert (await get(address, "/secret"))[0] == 404
    assert (await get(address, "/metrics", method="POST"))[0] == 405
    assert (await get(address, "/metrics", method="HEAD"))[2] == ""
    assert (await get(address, "no http at all"))[0] == 400
    # A head without end is cut off.
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 8000)
    with_error = asyncio.gather(writer.drain(), reader.read(), return_exceptions=True)
    async with asyncio.timeout(4):
        await with_error
    writer.close()


async def test_one_connection_too_many_is_closed_and_others_go_on(measured: tuple[Server, Api]) -> None:
    server, _ = measured
    assert server.metrics is not None
    host, _, port = server.metrics.address.rpartition(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS)]
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(4):
            assert await reader.read() == b""
        writer.close()
        for _, each in idle[:2]:
            each.close()

        async def served() -> bool:
            try:
                return (await get(server.metrics.address, "/metrics"))[0] == 200  # type: ignore[union-attr]
            except (OSError, asyncio.IncompleteReadError):
                return False

        await eventually(served)
    finally:
        for _, each in idle:
            each.close()


async def test_address_that_is_taken_is_an_error_of_the_setting(
    measured: tuple[Server, Api], tmp_path: Path, spawner: Spawner
) -> None:
    server, _ = measured
    assert server.metrics is not None
    with pytest.raises(ConfigError, match="metrics_listen"):
        async with serving(tmp_path, spawner, metrics_listen=server.metrics.address):
            pass


async def test_without_the_setting_there_are_no_metrics(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner) as (server, _):
        assert server.metrics is None


def test_models_beyond_the_limit_are_one() -> None:
    counted = CallMetrics(lambda name: name)
    for number in range(MAX_MODELS + 5):
        call = Call("/a.B/Generate", model=f"m{number}", code="OK")
        counted.begin(call)
        assert call.on_delta is not None
        call.on_delta(1)
        call.ended_s = 1.0
        counted.end(call)
    [first] = [t for t in counted.taken() if t.metric is families.TIME_TO_FIRST_TOKEN]
    names = {labels[2] for labels, _ in first.values}
    assert len(names) == MAX_MODELS + 1 and OTHER in names
    counted.forget("m0")
    [first] = [t for t in counted.taken() if t.metric is families.TIME_TO_FIRST_TOKEN]
    assert "m0" not in {labels[2] for labels, _ in first.values}


async def test_memory_of_gpus_is_told_when_there_are_some_and_read_again_when_it_is_old() -> None:
    now, asked = [100.0], 0

    async def devices() -> list[DeviceInfo]:
        nonlocal asked
        asked += 1
        return [DeviceInfo("CPU", "", "cpu", 1, 2), DeviceInfo("CUDA0", "", "gpu", 3, 4)]

    async def memory() -> dict[str, int]:
        return {"tiny": 5}

    slow = SlowReadings(memory, devices, lambda: now[0])

    def told() -> dict[str, list[tuple[tuple[str, ...], object]]]:
        return {taken.metric.name: list(taken.values) for taken in slow.taken()}

    assert told()["bear_device_free_bytes"] == []

    async def read() -> bool:
        return told()["bear_device_free_bytes"] == [(("CUDA0",), 3)]

    await eventually(read)
    assert told()["bear_device_memory_bytes"] == [(("CUDA0",), 4)]
    assert told()["bear_worker_memory_bytes"] == [(("tiny",), 5)]
    assert asked == 1
    now[0] += FRESH_S

    async def again() -> bool:
        told()
        return asked == 2

    await eventually(again)
    await slow.close()
