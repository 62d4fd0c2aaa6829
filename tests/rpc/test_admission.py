"""A full queue as its callers see it: refused with a time to come again, or told their places."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from bear_grpc.executor.spawner import Spawner, WorkerProcess
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import (
    WAIT_S,
    Api,
    Code,
    StatusDetails,
    assert_status,
    collect,
    eventually,
    fails,
    kinds,
    read_until,
    serving,
)

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
MAX_WAITING = 3
FOR_EVER: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True}


class GatedSpawner(Spawner):
    """Starts workers only while its gate is open."""

    def __init__(self, module: str) -> None:
        self._is_open = True
        self._held: list[Future[WorkerProcess]] = []
        super().__init__(module=module)

    def order(self) -> Future[WorkerProcess]:
        if self._is_open:
            return super().order()
        self._held.append(Future())
        return self._held[-1]

    def close_gate(self) -> None:
        self._is_open = False

    def open_gate(self) -> None:
        self._is_open = True
        for held in self._held:
            super().order().add_done_callback(lambda order, held=held: held.set_result(order.result()))
        self._held.clear()


@pytest.fixture(scope="module")
def paced() -> Iterator[GatedSpawner]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        thread = GatedSpawner("tests.helpers.paced_worker")
        yield thread
        thread.close()
        thread.join()


@pytest.fixture
async def model(paced: GatedSpawner, tmp_path: Path) -> AsyncIterator[Api]:
    """A server with the loaded model `m`: one sequence at a time, each token takes 20 ms."""
    path = write_tiny_llama(tmp_path / "m.gguf", context_length=2048)
    settings = {"max_waiting_requests": MAX_WAITING, "max_waiting_tokens": 400}
    async with serving(tmp_path, paced, **settings) as (_, api):
        await api.register("m", path, load_options=pb.LoadOptions(threads=1, max_sequences=1))
        await api.load("m")
        yield api


def retry_s(status: StatusDetails) -> float:
    assert status.retry is not None
    return status.retry.retry_delay.ToTimedelta().total_seconds()


async def refused(calls: list[Any]) -> list[StatusDetails]:
    """The refusals among calls that were made at once; the others are served."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [
        assert_status(result, Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        for result in results
        if isinstance(result, BaseException)
    ]


async def fill(api: Api) -> list[Any]:
    """One call that runs and as many as may wait, all of which ask for their places."""
    calls = [api.generate("m", **FOR_EVER)]
    await read_until(calls[0], "delta")
    for _ in range(MAX_WAITING):
        calls.append(api.generate("m", queue_progress=True, **FOR_EVER))
        await read_until(calls[-1], "queued")
    return calls


@pytest.mark.parametrize("max_tokens", [8, 24])
async def test_retry_info_follows_how_quickly_others_start(model: Api, max_tokens: int) -> None:
    async def client() -> None:
        for _ in range(4):
            await model.once("m", max_tokens=max_tokens, ignore_eos=True)

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(MAX_WAITING)))
    each_s = (time.monotonic() - began) / 4 / MAX_WAITING
    found = await refused([model.once("m", max_tokens=max_tokens, ignore_eos=True) for _ in range(12)])
    assert len(found) >= 12 - 2 * MAX_WAITING
    times = sorted(map(retry_s, found))
    assert 0.4 * each_s <= times[0] <= 2.5 * each_s
    # Each has a time of its own: the last one is due when all before it have started.
    assert all(sooner < later for sooner, later in itertools.pairwise(times))
    assert 0.4 * each_s <= (times[-1] - times[0]) / (len(times) - 1) <= 2.5 * each_s


async def test_a_refusal_tells_which_bound_and_the_numbers(model: Api) -> None:
    calls = await fill(model)
    status = await fails(model.once("m", n=2), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert status.metadata == {"model": "m", "unit": "requests", "limit": "3", "waiting": "3", "asked": "2"}
    # Nothing has had to wait before: the time is a guess.
    assert retry_s(status) == pytest.approx(2, rel=0.5)
    for call in calls:
        call.cancel()
    await model.idle("m")
    assert (await model.once("m", max_tokens=1)).usage.completion_token_count == 1


async def test_prompts_that_wait_are_bounded_in_tokens(model: Api) -> None:
    running = model.generate("m", **FOR_EVER)
    await read_until(running, "delta")
    waiting = model.generate("m", token_ids=[5] * 390, max_tokens=1, queue_progress=True)
    assert (await waiting.read()).queued.position == 0
    call = model.once("m", token_ids=[6] * 11, max_tokens=1)
    status = await fails(call, Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert status.metadata == {
        "model": "m",
        "unit": "tokens",
        "limit": "400",
        "waiting": "390",
        "asked": "11",
    }
    assert retry_s(status) > 0
    small = asyncio.ensure_future(model.once("m", token_ids=[6] * 10, max_tokens=1))
    running.cancel()
    assert kinds(await collect(waiting))[-1] == "completed"
    assert (await small).usage.prompt_token_count == 10


async def test_a_call_that_comes_again_when_it_was_told_is_served(model: Api) -> None:
    async def client() -> int:
        """How often it was refused."""
        for tries in itertools.count():
            try:
                await model.once("m", max_tokens=2, ignore_eos=True)
            except grpc.RpcError as exc:
                await asyncio.sleep(retry_s(assert_status(exc, Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")))
            else:
                return tries
        raise AssertionError("never")

    async with asyncio.timeout(WAIT_S):
        tries = await asyncio.gather(*(client() for _ in range(2 * MAX_WAITING + 2)))
    assert max(tries) <= 4
    assert any(tries)


async def test_places_are_told_as_the_queue_moves(model: Api) -> None:
    calls = await fill(model)
    calls[1].cancel()
    for call, position in ((calls[2], 0), (calls[3], 1)):
        [event] = await read_until(call, "queued")
        assert event.queued.position == position
    calls[0].cancel()
    await read_until(calls[2], "started")
    [event] = await read_until(calls[3], "queued")
    assert event.queued.position == 0
    assert event.queued.estimated_wait_seconds > 0
    calls[2].cancel()
    seen = await read_until(calls[3], "delta")
    assert kinds(seen) == ["started", "delta"]
    calls[3].cancel()


async def test_calls_that_tell_of_the_server_are_answered_while_the_queue_is_full(model: Api) -> None:
    async with asyncio.timeout(WAIT_S):
        service = "models/m"
        calls = await fill(model)
        watch = model.health.Watch(health_pb2.HealthCheckRequest(service=service))
        assert (await watch.read()).status == SERVING
        models = model.models.WatchModels(models_pb.WatchModelsRequest())
        assert await models.read() is not grpc.aio.EOF
        for _ in range(4 * MAX_WAITING):
            await fails(model.once("m"), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert await model.serving(service) == "SERVING"
            status = await model.status("m")
            assert (status.running_count, status.waiting_count) == (1, MAX_WAITING)
            listed = (await model.models.ListModels(models_pb.ListModelsRequest())).models
            assert "m" in [found.name for found in listed]
        # Texts have a queue of their own.
        asked = inference_pb.CountTokensRequest(model="m", prompt="hello")
        assert (await model.inference.CountTokens(asked)).token_count == 6
        for call in (watch, models, *calls):
            call.cancel()


async def test_what_comes_while_there_is_no_worker_waits_behind_all_of_them(
    model: Api, paced: GatedSpawner
) -> None:
    """Also behind the one that ran: in the next worker each of them needs a slot first, so all count."""
    running = model.generate("m", **FOR_EVER)
    await read_until(running, "delta")
    waiting = model.generate("m", queue_progress=True, **FOR_EVER)
    await read_until(waiting, "queued")
    paced.close_gate()
    os.kill((await model.status("m")).worker_process_id, signal.SIGKILL)

    async def is_gone() -> bool:
        status = await model.status("m")
        return status.reason == pb.MODEL_STATE_REASON_RESTARTING and status.waiting_count == 2

    await eventually(is_gone)
    # There is room for one more, whichever comes first.
    two = [model.generate("m", queue_progress=True, **FOR_EVER) for _ in range(2)]
    reads = [asyncio.ensure_future(read_until(call, "queued")) for call in two]
    done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
    [over] = done
    error = over.exception()
    assert error is not None
    status = assert_status(error, Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert status.metadata["waiting"] == str(MAX_WAITING)
    assert retry_s(status) > 0
    [(late, seen)] = [pair for pair in zip(two, reads, strict=True) if pair[1] is not over]
    paced.open_gate()
    await read_until(running, "delta")
    assert (await seen)[-1].queued.position == 1
    for call in (running, waiting):
        call.cancel()
    assert kinds(await read_until(late, "delta"))[-2:] == ["started", "delta"]
    late.cancel()
