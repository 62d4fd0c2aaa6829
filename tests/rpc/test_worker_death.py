"""A worker that dies takes its own streams with it and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from grpc_health.v1 import health_pb2

from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import WAIT_S, Api, Code, eventually, fails, read_until, stream_fails
from tests.rpc.conftest import NewModel

LONG = {"max_tokens": 1900, "ignore_eos": True}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV], ids=lambda n: n.name)
async def test_a_worker_that_dies_in_a_stream_is_told_and_can_be_loaded_again(
    api: Api, steady: str, tiny: str, number: signal.Signals
) -> None:
    watch = api.health.Watch(health_pb2.HealthCheckRequest(service=f"models/{steady}"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    running = api.generate(steady, **LONG)
    await read_until(running, "delta")
    waiting = api.generate(steady, queue_progress=True, **LONG)
    await read_until(waiting, "queued")
    pid = (await api.status(steady)).worker_process_id
    os.kill(pid, number)
    for call in (running, waiting):
        seen, status = await stream_fails(call, Code.UNAVAILABLE, "WORKER_CRASHED")
        assert not any(event.HasField("completed") for event in seen)
        assert (status.metadata["model"], status.metadata["exit"]) == (steady, number.name)
        assert status.retry is not None
        assert status.retry.retry_delay.ToTimedelta().total_seconds() > 0
    model = await api.status(steady)
    assert (model.state, model.reason) == (pb.MODEL_STATE_FAILED, pb.MODEL_STATE_REASON_WORKER_CRASHED)
    assert number.name in model.message
    assert model.worker_process_id == 0
    async with asyncio.timeout(WAIT_S):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await api.serving("") == "SERVING"
    assert (await api.once(tiny, max_tokens=1)).usage.completion_token_count == 1
    await fails(api.once(steady, load_if_needed=False), Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED")
    assert (await api.load(steady)).status.worker_process_id not in (0, pid)
    async with asyncio.timeout(WAIT_S):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    assert (await api.once(steady, max_tokens=1)).usage.completion_token_count == 1


async def test_other_models_go_on_while_a_worker_dies(api: Api, steady: str, new_model: NewModel) -> None:
    other = await new_model()
    await api.load(other)
    alone = await api.once(other, temperature=0, max_tokens=500, ignore_eos=True)
    dying = api.generate(steady, **LONG)
    await read_until(dying, "delta")
    living = asyncio.ensure_future(api.once(other, temperature=0, max_tokens=500, ignore_eos=True))
    os.kill((await api.status(steady)).worker_process_id, signal.SIGKILL)
    await stream_fails(dying, Code.UNAVAILABLE, "WORKER_CRASHED")
    assert (await living).choices[0].text == alone.choices[0].text


async def test_a_request_after_a_crash_loads_the_model_again(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    pid = (await api.load(name)).status.worker_process_id
    os.kill(pid, signal.SIGKILL)

    async def dead() -> bool:
        return await api.state(name) == "FAILED"

    await eventually(dead)
    assert (await api.once(name, max_tokens=1)).usage.completion_token_count == 1


async def test_a_worker_that_dies_while_loading_fails_the_load(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    call = api.load(name)
    pid = await api.loading(name)
    os.kill(pid, signal.SIGSTOP)
    assert await api.state(name) == "LOADING"
    os.kill(pid, signal.SIGKILL)
    status = await fails(call, Code.INTERNAL, "ENGINE_START_FAILED")
    assert "SIGKILL" in status.message
    model = await api.status(name)
    assert (model.state, model.reason) == (pb.MODEL_STATE_FAILED, pb.MODEL_STATE_REASON_LOAD_FAILED)
    await api.load(name)


async def test_a_text_call_of_a_dying_worker_ends(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    pid = (await api.load(name)).status.worker_process_id
    os.kill(pid, signal.SIGSTOP)
    call = api.inference.Tokenize(inference_pb.TokenizeRequest(model=name, text="hello"))
    task = asyncio.ensure_future(call)
    await api.state(name)
    os.kill(pid, signal.SIGKILL)
    await fails(task, Code.UNAVAILABLE, "WORKER_CRASHED")


async def test_a_stopped_worker_can_still_be_unloaded(api: Api, new_model: NewModel) -> None:
    """It cannot answer Stop: it is killed after its time."""
    name = await new_model()
    pid = (await api.load(name)).status.worker_process_id
    os.kill(pid, signal.SIGSTOP)
    assert (await api.unload(name, 0)).status.state == pb.MODEL_STATE_AVAILABLE
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
