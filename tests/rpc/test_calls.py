"""What is known of a call while it runs and when it has ended, for those who count and log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.call import Call
from bear_grpc.rpc.calls import Calls
from bear_grpc.types import FinishReason
from tests.helpers.rpc import Api, Code, collect, eventually, fails, read_until, serving

GENERATE = "/bear_grpc.v1.InferenceService/Generate"


class Seen:
    """Observer: the calls that have begun and those that have ended."""

    def __init__(self) -> None:
        self.begun: list[Call] = []
        self.ended: list[Call] = []

    def begin(self, call: Call) -> None:
        self.begun.append(call)

    def end(self, call: Call) -> None:
        self.ended.append(call)

    async def last(self, method: str) -> Call:
        async def found() -> Call | None:
            return next((call for call in reversed(self.ended) if call.method.endswith(method)), None)

        call = await eventually(found)
        assert call is not None
        return call


class Angry:
    """An observer that fails: nobody else may notice."""

    def begin(self, call: Call) -> None:
        raise RuntimeError("begin")

    def end(self, call: Call) -> None:
        raise RuntimeError("end")


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
async def watched(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, tiny_file: Path, seen: Seen
) -> AsyncIterator[Api]:
    folder = tmp_path_factory.mktemp("calls")
    async with serving(folder, spawner, allow_path=[tiny_file.parent]) as (server, api):
        server.calls.add(Angry())
        server.calls.add(seen)
        await api.register("tiny", tiny_file)
        await api.load("tiny")
        yield api


@pytest.fixture(autouse=True)
def fresh(seen: Seen) -> Iterator[None]:
    seen.begun.clear()
    seen.ended.clear()
    yield


async def test_generation_that_ends_is_told_with_all_that_it_was(watched: Api, seen: Seen) -> None:
    answer = await watched.once("tiny", max_tokens=5, ignore_eos=True, request_id="mine", n=2)
    call = await seen.last("GenerateOnce")
    assert (call.code, call.reason, call.model, call.request_id) == ("OK", "", "tiny", "mine")
    assert call.usage.prompt_tokens == answer.usage.prompt_token_count
    assert call.usage.completion_tokens == 10
    assert call.finish_reasons == [FinishReason.LENGTH] * 2
    assert call.timings is not None and call.timings.total_s <= call.ended_s - call.began_s
    assert call.caller.tenant == "unix"
    assert call in seen.begun


async def test_error_is_told_by_code_and_reason(watched: Api, seen: Seen) -> None:
    await fails(watched.once("nobody"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    call = await seen.last("GenerateOnce")
    assert (call.code, call.reason, call.model) == ("NOT_FOUND", "MODEL_NOT_FOUND", "nobody")


async def test_call_that_its_client_leaves_is_cancelled(watched: Api, seen: Seen) -> None:
    stream = watched.generate("tiny", max_tokens=1900, ignore_eos=True)
    await read_until(stream, "started")
    stream.cancel()
    call = await seen.last("Generate")
    assert call.code == "CANCELLED"


async def test_pieces_of_text_are_told_to_who_asks(watched: Api, seen: Seen) -> None:
    tokens: list[int] = []

    class Listener:
        def begin(self, call: Call) -> None:
            call.on_delta = tokens.append

        def end(self, call: Call) -> None:
            pass

    seen.begin = Listener().begin  # type: ignore[method-assign]
    try:
        await collect(watched.generate("tiny", max_tokens=6, ignore_eos=True))
    finally:
        del seen.begin
    assert sum(tokens) == 6


async def test_health_and_reflection_are_calls_too(watched: Api, seen: Seen) -> None:
    watch = watched.health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    assert (await seen.last("Watch")).code == "CANCELLED"
    stub = reflection_pb2_grpc.ServerReflectionStub(watched.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    assert answers[0].list_services_response.service
    assert (await seen.last("ServerReflectionInfo")).code == "OK"


@pytest.mark.parametrize(("told", "code"), [(None, Code.UNKNOWN), (Code.NOT_FOUND, Code.NOT_FOUND)])
async def test_failure_that_no_servicer_maps_is_told_as_its_client_sees_it(
    told: grpc.StatusCode | None, code: grpc.StatusCode
) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        if told is not None:
            context.set_code(told)
        raise ValueError("of an interceptor, or of a servicer that is not ours")

    seen, calls = Seen(), Calls()
    calls.add(seen)
    server = grpc.aio.server(interceptors=[calls])
    handlers = {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/a.B/Fail")(b"")
        assert caught.value.code() is code
        assert (await seen.last("Fail")).code == code.name
    finally:
        await server.stop(0)


async def test_method_that_does_not_exist_is_unimplemented(watched: Api) -> None:
    nothing = watched.channel.unary_unary("/bear_grpc.v1.InferenceService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await nothing(b"")
    assert caught.value.code() is Code.UNIMPLEMENTED
