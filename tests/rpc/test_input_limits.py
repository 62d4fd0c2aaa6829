"""Limits that gRPC holds, and those that are told and set."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
import psutil

from bear_grpc.executor.spawner import Spawner
from bear_grpc.input_limits import InputLimits
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import server_service_pb2 as server_pb
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import Api, Code, fails, serving

BOMB_BYTES = 200 * 2**20
UNLIMITED = [("grpc.max_send_message_length", -1)]


def health_with(size: int) -> tuple[tuple[str, str], ...]:
    return (("x-filling", "a" * size),)


async def code_of(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    with contextlib.suppress(grpc.RpcError):
        await call
    return await call.code()


async def test_limits_of_the_settings_are_in_force_and_told(tmp_path: Path, spawner: Spawner) -> None:
    limits = InputLimits(max_answers=2, max_message_bytes=4096, max_text_bytes=100, max_choices=3)
    async with serving(tmp_path, spawner, limits=limits) as (_, api):
        info = await api.server.GetServerInfo(server_pb.GetServerInfoRequest())
        for name in ("max_answers", "max_message_bytes", "max_text_bytes", "max_choices", "max_logit_bias"):
            assert getattr(info.limits, name) == getattr(limits, name)
        status = await fails(api.once("bear-demo", n=3), Code.INVALID_ARGUMENT, "INVALID_FIELD")
        assert status.fields == ["request.n"]
        count = api.inference.CountTokens(
            inference_pb.CountTokensRequest(model="bear-demo", prompt="x" * 101)
        )
        assert (await fails(count, Code.INVALID_ARGUMENT, "INVALID_FIELD")).fields == ["prompt"]
        ids = inference_pb.DetokenizeRequest(model="bear-demo", token_ids=[1] * 4096)
        assert await code_of(api.inference.Detokenize(ids)) is Code.RESOURCE_EXHAUSTED


async def test_a_template_that_writes_too_much_is_refused_by_its_setting(
    tmp_path: Path, spawner: Spawner, tiny_file: Path
) -> None:
    settings = {"allow_path": [tiny_file.parent], "limits": InputLimits(max_rendered_chars=50)}
    async with serving(tmp_path, spawner, **settings) as (_, api):
        await api.register("tiny", tiny_file)
        messages = [{"role": "user", "content": "word " * 20}]
        call = api.once("tiny", messages=messages, max_tokens=1)  # type: ignore[arg-type]
        status = await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")
        assert "50 characters" in status.message


async def test_metadata_is_taken_up_to_the_limit_and_never_above_it(tmp_path: Path, spawner: Spawner) -> None:
    """Between two limits of gRPC's own, chance would decide."""
    async with serving(tmp_path, spawner, limits=InputLimits(max_metadata_bytes=12_000)) as (_, api):
        for _ in range(20):
            for size, code in ((10_000, Code.OK), (12_500, Code.RESOURCE_EXHAUSTED)):
                request = server_pb.GetLoadRequest()
                found = await code_of(api.server.GetLoad(request, metadata=health_with(size)))
                assert found is code


async def test_a_compression_bomb_is_refused_without_being_unpacked(tmp_path: Path) -> None:
    async with RunningServer(tmp_path) as server, Api(server.target, list(UNLIMITED)) as api:
        await server.ready()
        process = psutil.Process(server.pid)
        before = process.memory_info().rss
        most = before

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, process.memory_info().rss)
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        request = inference_pb.CountTokensRequest(model="bear-demo", prompt="x" * BOMB_BYTES)
        call = api.inference.CountTokens(request, compression=grpc.Compression.Gzip)
        assert await code_of(call) is Code.RESOURCE_EXHAUSTED
        watching.cancel()
        assert most - before < BOMB_BYTES // 4
        assert await server.api.serving("") == "SERVING"
