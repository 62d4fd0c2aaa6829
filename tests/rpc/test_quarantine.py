"""Requests that end their workers, beside others that do not: only the former are refused."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bear_grpc.executor.crash import CrashReport
from bear_grpc.executor.link import WorkerLink
from bear_grpc.executor.spawner import Spawner
from bear_grpc.protocol import Load, Ready, ToServer
from bear_grpc.types import LoadOptions
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers import faulty_worker
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import WAIT_S, Api, Code, collect, eventually, fails, read_until, serving, text_of

HONEST: dict[str, Any] = {"token_ids": [5, 6, 7], "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def model(faulty: Spawner, tmp_path: Path) -> AsyncIterator[Api]:
    """A server with the loaded model `m`, which computes several sequences at once."""
    path = write_tiny_llama(tmp_path / "m.gguf", context_length=2048)
    async with serving(tmp_path, faulty, heartbeat_timeout_s=2.0) as (_, api):
        await api.register("m", path, load_options=pb.LoadOptions(threads=1, max_sequences=4))
        await api.load("m", flash_attention=False)
        yield api


@pytest.mark.parametrize("poison", [faulty_worker.ABORTS, faulty_worker.SEGFAULTS], ids=["abort", "segv"])
async def test_the_request_that_ends_workers_is_refused_and_the_others_go_on(
    model: Api, poison: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    running = [model.generate("m", max_tokens=1500, **HONEST) for _ in range(2)]
    seen = [await read_until(call, "delta") for call in running]
    call = model.once("m", token_ids=poison, max_tokens=4)
    status = await fails(call, Code.FAILED_PRECONDITION, "REQUEST_QUARANTINED")
    assert status.metadata["exit"] in ("SIGABRT", "SIGSEGV")
    for call, before in zip(running, seen, strict=True):
        events = before + await collect(call)
        assert events[-1].completed.usage.completion_token_count == 1500
        assert text_of(events)
    assert await model.state("m") == "READY"
    if poison == faulty_worker.ABORTS:
        assert "native code said: poison.c:7: poisoned" in caplog.text
    assert "sequences in its step: " in caplog.text


async def test_a_request_whose_worker_is_killed_is_not_refused_for_it(model: Api) -> None:
    call = model.once("m", token_ids=faulty_worker.IS_KILLED, max_tokens=4)
    await fails(call, Code.UNAVAILABLE, "WORKER_CRASHED")


async def test_a_worker_that_is_stopped_is_replaced(model: Api) -> None:
    whole = await model.once("m", max_tokens=600, **HONEST)
    call = model.generate("m", max_tokens=600, **HONEST)
    seen = await read_until(call, "delta", 3)
    pid = (await model.status("m")).worker_process_id
    os.kill(pid, signal.SIGSTOP)

    async def restarting() -> str:
        status = await model.status("m")
        return status.message if status.reason == pb.MODEL_STATE_REASON_RESTARTING else ""

    assert "stuck: no sign of life" in await eventually(restarting)
    seen += await collect(call)
    assert text_of(seen) == whole.choices[0].text


@pytest.mark.slow
async def test_a_worker_whose_step_does_not_end_is_replaced(
    model: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bear_grpc.executor")
    call = model.once("m", token_ids=faulty_worker.HANGS, max_tokens=4, fail_on_restart=True)
    status = await fails(call, Code.UNAVAILABLE, "WORKER_CRASHED")
    assert status.metadata["exit"].startswith("stuck: step ")
    assert "in faulty" in caplog.text
    assert (await model.once("m", max_tokens=1, **HONEST)).usage.completion_token_count == 1


async def test_a_worker_that_is_ended_as_stuck_writes_its_stacks(spawner: Spawner, tmp_path: Path) -> None:
    ready, ended = asyncio.Event(), asyncio.get_running_loop().create_future()

    def take(frame: ToServer) -> None:
        if isinstance(frame, Ready):
            ready.set()

    def end(report: CrashReport) -> None:
        ended.set_result(report)

    link = await WorkerLink.start("m", spawner, take, end)
    path = write_tiny_llama(tmp_path / "m.gguf")
    link.send(Load("m", str(path), LoadOptions(threads=1, repack=False), 1))
    async with asyncio.timeout(WAIT_S):
        await ready.wait()
        await link.end_stuck("why not")
        report = await ended
    assert (report.how, report.cause) == ("SIGKILL", "stuck: why not")
    assert any("_serve" in line for line in report.lines), report.lines
