"""Workers that are stopped, starved or slow: the stuck ones are replaced, the slow ones are left alone."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bear_grpc.errors import EngineStartFailed
from bear_grpc.executor.share import CpuShare
from bear_grpc.executor.spawner import Spawner
from bear_grpc.executor.supervisor import Supervisor
from bear_grpc.protocol import Load
from bear_grpc.types import LoadOptions
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers import faulty_worker
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import WAIT_S, Api, Code, collect, eventually, fails, read_until, serving, text_of

ROOT = Path(__file__).parents[2]
LIMIT_S = 2.0
ONE_THREAD = pb.LoadOptions(threads=1)
HONEST: dict[str, Any] = {"token_ids": [5, 6, 7], "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def watched(faulty: Spawner, tmp_path: Path) -> AsyncIterator[Api]:
    """A server with two registered models: `m`, and `slow`, whose load waits for a signal."""
    async with serving(tmp_path, faulty, heartbeat_timeout_s=LIMIT_S) as (_, api):
        path = write_tiny_llama(tmp_path / "m.gguf", context_length=2048)
        await api.register("m", path, load_options=ONE_THREAD)
        path = write_tiny_llama(tmp_path / faulty_worker.SLOW, context_length=2048)
        for name in ("slow", "other"):
            await api.register(name, path, load_options=ONE_THREAD)
        yield api


async def weights_of(api: Api, name: str, *, but: int = 0) -> int:
    """Waits until a worker reads weights; gives its id, another one than `but`."""

    async def reads() -> int:
        status = await api.status(name)
        is_far = status.load_progress.stage == pb.LOAD_STAGE_WEIGHTS
        return status.worker_process_id if is_far and status.worker_process_id != but else 0

    return await eventually(reads)


def caught_by(pid: int) -> set[int]:
    """The signals that a process has handlers for."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")]
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


async def let_load(pid: int) -> None:
    """Lets a slow load go on, once its worker has a handler for the signal."""

    async def listens() -> bool:
        return signal.SIGUSR2 in caught_by(pid)

    await eventually(listens)
    os.kill(pid, signal.SIGUSR2)


async def test_a_worker_that_is_stopped_while_it_loads_is_ended_and_a_slow_one_is_not(watched: Api) -> None:
    slow = asyncio.ensure_future(watched.load("slow"))
    lives = await weights_of(watched, "slow")
    stopped = asyncio.ensure_future(watched.load("other"))
    os.kill(await weights_of(watched, "other"), signal.SIGSTOP)
    status = await fails(stopped, Code.INTERNAL, "ENGINE_START_FAILED")
    assert "stuck: no sign of life" in status.message
    assert await watched.state("other") == "FAILED"
    # It has loaded for longer than the other one was silent.
    assert await weights_of(watched, "slow") == lives
    await let_load(lives)
    assert (await slow).status.worker_process_id == lives
    assert (await watched.once("slow", max_tokens=1, ignore_eos=True)).usage.completion_token_count == 1


async def test_a_worker_that_is_stopped_while_it_starts_again_is_replaced(watched: Api) -> None:
    load = asyncio.ensure_future(watched.load("slow"))
    await let_load(first := await weights_of(watched, "slow"))
    await load
    call = watched.generate("slow", max_tokens=1500, **HONEST)
    seen = await read_until(call, "delta")
    os.kill(first, signal.SIGKILL)
    os.kill(second := await weights_of(watched, "slow", but=first), signal.SIGSTOP)
    await let_load(await weights_of(watched, "slow", but=second))
    seen += await collect(call)
    assert seen[-1].completed.usage.completion_token_count == 1500


async def test_a_worker_that_never_speaks_is_ended(spawner: Spawner, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf")
    supervisor = Supervisor(
        "m",
        spawner=spawner,
        share=CpuShare(),
        heartbeat_timeout_s=1.0,
        startup_timeout_s=1.0,
        on_frame=lambda frame: None,
        on_end=lambda report: None,
    )
    start = asyncio.ensure_future(supervisor.start(Load("m", str(path), LoadOptions(threads=1), 1)))

    async def pid() -> int:
        return supervisor.pid

    os.kill(await eventually(pid), signal.SIGSTOP)
    with pytest.raises(EngineStartFailed, match="no sign of life"):
        async with asyncio.timeout(WAIT_S):
            await start
    assert (supervisor.pid, supervisor.left) == (0, ())


TEXTS, TOKENS = 8, 100_000


@pytest.mark.parametrize("goes_on", [True, False], ids=["and goes on", "and is replaced"])
async def test_a_worker_that_does_not_read_holds_up_its_own_calls_only(
    spawner: Spawner, tmp_path: Path, goes_on: bool
) -> None:
    """What it is sent is more than the socket holds."""
    limit_s = WAIT_S if goes_on else LIMIT_S
    async with serving(tmp_path, spawner, heartbeat_timeout_s=limit_s) as (_, api):
        path = write_tiny_llama(tmp_path / "m.gguf", context_length=2048)
        for name in ("deaf", "well"):
            await api.register(name, path, load_options=ONE_THREAD)
            await api.load(name)
        pid = (await api.status("deaf")).worker_process_id
        os.kill(pid, signal.SIGSTOP)
        request = inference_pb.DetokenizeRequest(model="deaf", token_ids=[200] * TOKENS)
        calls = [asyncio.ensure_future(api.inference.Detokenize(request)) for _ in range(TEXTS)]
        stream = api.generate("deaf", max_tokens=20, **HONEST)
        for _ in range(3):
            assert (await api.once("well", max_tokens=20, **HONEST)).usage.completion_token_count == 20
        assert not any(call.done() for call in calls)
        if goes_on:
            os.kill(pid, signal.SIGCONT)
        async with asyncio.timeout(WAIT_S):
            texts = {answer.text for answer in await asyncio.gather(*calls)}
        assert len(texts) == 1
        assert (await collect(stream))[-1].completed.usage.completion_token_count == 20
        assert ((await api.status("deaf")).worker_process_id == pid) is goes_on


async def test_a_worker_without_memory_ends_and_its_requests_go_on_in_the_next(watched: Api) -> None:
    await watched.load("m", flash_attention=False)
    whole = await watched.once("m", max_tokens=1500, **HONEST)
    call = watched.generate("m", max_tokens=1500, **HONEST)
    seen = await read_until(call, "delta")
    worker = psutil.Process((await watched.status("m")).worker_process_id)
    worker.rlimit(resource.RLIMIT_AS, (worker.memory_info().vms,) * 2)
    hungry = await watched.once("m", token_ids=faulty_worker.GROWS, max_tokens=4, ignore_eos=True)
    assert hungry.usage.completion_token_count == 4
    assert not worker.is_running()
    seen += await collect(call)
    assert text_of(seen) == whole.choices[0].text


async def test_a_load_without_memory_fails_with_its_cause(watched: Api) -> None:
    load = asyncio.ensure_future(watched.load("slow"))
    pid = await weights_of(watched, "slow")
    psutil.Process(pid).rlimit(resource.RLIMIT_AS, (1 << 20,) * 2)
    await let_load(pid)
    await fails(load, Code.INTERNAL, "ENGINE_START_FAILED")
    status = await watched.status("slow")
    assert (status.state, status.reason) == (pb.MODEL_STATE_FAILED, pb.MODEL_STATE_REASON_LOAD_FAILED)
    await watched.load("m")
    assert (await watched.once("m", max_tokens=1, **HONEST)).usage.completion_token_count == 1


async def test_a_worker_that_cannot_write_its_log_works_and_is_replaced(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        spawner = Spawner(module="tests.helpers.full_disk_worker")
        try:
            async with serving(tmp_path, spawner) as (_, api):
                path = write_tiny_llama(tmp_path / "m.gguf", context_length=2048)
                await api.register("m", path, load_options=ONE_THREAD)
                await api.load("m")
                call = api.generate("m", max_tokens=1500, **HONEST)
                seen = await read_until(call, "delta")
                # It writes its stacks, and the last words of native code.
                os.kill((await api.status("m")).worker_process_id, signal.SIGABRT)
                seen += await collect(call)
                assert seen[-1].completed.usage.completion_token_count == 1500
        finally:
            spawner.close()
            spawner.join()
