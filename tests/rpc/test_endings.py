"""Ends that meet: a crash in a drain, a stop in a drain; and what a registration keeps."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec

from bear_grpc.config import ModelConfig
from bear_grpc.executor.spawner import Spawner
from bear_grpc.params import GenerationDefaults
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import WAIT_S, Api, Code, eventually, read_until, serving, stream_fails

AN_HOUR_S = 3600


async def unloading(api: Api, name: str) -> bool:
    return await api.state(name) == "UNLOADING"


async def test_a_crash_while_an_unload_drains_is_told_as_a_crash(api: Api, steady: str) -> None:
    call = api.generate(steady, max_tokens=1900, ignore_eos=True)
    await read_until(call, "delta")
    unload = asyncio.ensure_future(api.unload(steady, AN_HOUR_S))
    await eventually(lambda: unloading(api, steady))
    os.kill((await api.status(steady)).worker_process_id, signal.SIGKILL)
    await stream_fails(call, Code.UNAVAILABLE, "WORKER_CRASHED")
    async with asyncio.timeout(WAIT_S):
        await unload
    assert await api.state(steady) == "AVAILABLE"


async def test_a_stop_does_not_wait_for_the_drain_of_an_unload(
    tmp_path: Path, spawner: Spawner, steady_file: Path
) -> None:
    async with serving(tmp_path, spawner, allow_path=[steady_file.parent]) as (server, api):
        await api.register("steady", steady_file, load_options=pb.LoadOptions(threads=1, max_sequences=1))
        await api.load("steady")
        call = api.generate("steady", max_tokens=1900, ignore_eos=True)
        await read_until(call, "delta")
        unload = asyncio.ensure_future(api.unload("steady", AN_HOUR_S))
        await eventually(lambda: unloading(api, "steady"))
        async with asyncio.timeout(WAIT_S):
            await server.stop(0)
            await stream_fails(call, Code.UNAVAILABLE, "MODEL_UNLOADED")
            await unload


async def test_the_configuration_over_a_registration_is_not_written_into_it(
    tmp_path: Path, spawner: Spawner
) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf")
    settings = {"mine": ModelConfig(defaults=GenerationDefaults(temperature=0.5))}
    async with serving(tmp_path, spawner, models=settings) as (server, api):
        await api.register("mine", path)
        entry = server.shelf.get("mine")
        assert entry.defaults.temperature == 0.5

        async def hashed() -> str:
            return entry.sha256

        await eventually(hashed)
    kept = msgspec.json.decode((tmp_path / "models" / "registered" / "mine.json").read_bytes())
    assert kept["sha256"] == entry.sha256
    assert kept["defaults"]["temperature"] is None
