"""A worker that dies is started again, and its requests go on: their clients see a gap and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import (
    WAIT_S,
    Api,
    Code,
    collect,
    eventually,
    fails,
    kinds,
    read_until,
    stream_fails,
    text_of,
)
from tests.helpers.ties import FACTOR, Greedy, are_same, noise
from tests.rpc.conftest import NewModel

LONG = {"max_tokens": 1900, "ignore_eos": True}
# What another shape of a step changes at least in a log probability.
ROUNDING = 1e-4
KINDS = [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV]


async def kill(api: Api, name: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Ends a model's worker; gives its process id."""
    pid = (await api.status(name)).worker_process_id
    os.kill(pid, number)
    return pid


async def restarted(api: Api, name: str, pid: int) -> None:
    """Waits until a model has another worker."""

    async def another() -> bool:
        status = await api.status(name)
        return status.state == pb.MODEL_STATE_READY and status.worker_process_id not in (0, pid)

    await eventually(another)


def completions(events: list[Any]) -> list[Any]:
    return [event.completed for event in events if event.HasField("completed")]


@pytest.mark.parametrize("number", KINDS, ids=lambda n: n.name)
async def test_streams_go_on_after_their_worker_died(api: Api, steady: str, number: signal.Signals) -> None:
    """One that runs and one that waits."""
    options: dict[str, Any] = {
        "temperature": 0,
        "repetition_penalty": 1.0,  # or what is drawn has another lead than the log probabilities tell
        "max_tokens": 150,
        "ignore_eos": True,
        "queue_progress": True,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = await api.once(steady, **options)
    alone = Greedy.of(whole.choices[0].tokens)
    watch = api.health.Watch(health_pb2.HealthCheckRequest(service=f"models/{steady}"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    running = api.generate(steady, **options)
    seen = await read_until(running, "delta", 20)
    waiting = api.generate(steady, **options)
    await read_until(waiting, "queued")
    pid = await kill(api, steady, number)
    async with asyncio.timeout(WAIT_S):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    seen += await collect(running)
    late = await collect(waiting)
    for events in (seen, late):
        went_on = Greedy.of([token for event in events for token in event.delta.tokens])
        # What was read again rounds otherwise.
        assert are_same(alone, went_on, FACTOR * max(noise([(alone, went_on)]), ROUNDING))
        assert kinds(events).count("started") == 1
        (completed,) = completions(events)
        assert completed.usage.completion_token_count == 150
        assert completed.usage.prompt_token_count == whole.usage.prompt_token_count
        timings = completed.timings
        assert 0 <= timings.queue_seconds <= timings.total_seconds
        assert 0 < timings.ttft_seconds <= timings.total_seconds
    assert (await api.status(steady)).worker_process_id not in (0, pid)
    assert await api.serving("") == "SERVING"


ANSWERS: dict[str, dict[str, Any]] = {
    "penalties": {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "dry": {"temperature": 0, "dry_multiplier": 1.0, "dry_allowed_length": 1},
    "seed": {"seed": 7, "temperature": 1.5, "xtc_probability": 0.5},
    "mirostat": {"seed": 7, "temperature": 1.0, "mirostat": 2},
    "adaptive-p": {"seed": 7, "temperature": 1.0, "adaptive_p_target": 0.3},
    "tokens": {"seed": 3, "top_logprobs": 2, "return_token_ids": True},
    "echo": {"seed": 3, "echo": True},
    "regex": {"seed": 5, "regex": "([a-z]{3} ){200}"},
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_the_answer_is_the_same_as_without_a_death(api: Api, demo: str, name: str) -> None:
    await compare(api, demo, {"max_tokens": 120, "ignore_eos": name != "regex", **ANSWERS[name]})


async def test_answers_of_one_request_go_on_each_where_it_stands(api: Api, tiny: str) -> None:
    """One has ended or runs, the others wait: this model computes one at a time."""
    await compare(api, tiny, {"max_tokens": 300, "ignore_eos": True, "seed": 5, "n": 3, "temperature": 1.2})


async def compare(api: Api, model: str, options: dict[str, Any]) -> None:
    """The answers of a request with a death, and without."""
    alone = await collect(api.generate(model, "The bear went", **options))
    call = api.generate(model, "The bear went", **options)
    seen = await read_until(call, "delta", 5)
    await kill(api, model)
    seen += await collect(call)
    for index in range(options.get("n", 1)):
        one, other = ([e for e in events if e.index == index] for events in (alone, seen))
        assert text_of(one) == text_of(other)
        ids = [[token.id for event in events for token in event.delta.tokens] for events in (one, other)]
        assert ids[0] == ids[1]
        (first,), (second,) = completions(one), completions(other)
        assert first.finish_reason == second.finish_reason
        assert first.usage.completion_token_count == second.usage.completion_token_count


async def test_a_stop_sequence_is_found_across_the_cut(api: Api, demo: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}
    text = (await api.once(demo, "The bear went", **options)).choices[0].text
    stop = text[60:75]
    end = text.index(stop)
    for count in (2, 5, 8, 11):
        call = api.generate(demo, "The bear went", stop=[stop], **options)
        seen = await read_until(call, "delta", count)
        assert not completions(seen)
        await kill(api, demo)
        seen += await collect(call)
        assert text_of(seen) == text[:end]
        assert completions(seen)[0].stop_cause.sequence == stop


async def test_a_request_that_may_not_go_on_is_told(api: Api, steady: str, tiny: str) -> None:
    running = api.generate(steady, fail_on_restart=True, **LONG)
    await read_until(running, "delta")
    waiting = api.generate(steady, fail_on_restart=True, queue_progress=True, **LONG)
    await read_until(waiting, "queued")
    pid = await kill(api, steady)
    for call in (running, waiting):
        seen, status = await stream_fails(call, Code.UNAVAILABLE, "WORKER_CRASHED")
        assert not completions(seen)
        assert (status.metadata["model"], status.metadata["exit"]) == (steady, "SIGKILL")
        assert status.retry is not None
        assert status.retry.retry_delay.ToTimedelta().total_seconds() > 0
    assert (await api.once(tiny, max_tokens=1)).usage.completion_token_count == 1
    await restarted(api, steady, pid)
    assert (await api.once(steady, max_tokens=1)).usage.completion_token_count == 1


async def test_a_request_that_is_cut_off_again_and_again_is_given_up(api: Api, steady: str) -> None:
    call = api.generate(steady, **LONG)
    await read_until(call, "delta")
    ending = asyncio.ensure_future(stream_fails(call, Code.UNAVAILABLE, "WORKER_CRASHED"))
    deaths = 0
    while not ending.done():
        pid = await kill(api, steady)
        deaths += 1
        await restarted(api, steady, pid)
    await ending
    assert deaths >= 4  # it may go on three times; the death of a worker that still loads is not one
    assert (await api.once(steady, max_tokens=1)).usage.completion_token_count == 1


async def test_an_unload_ends_requests_that_wait_for_a_restart(api: Api, steady: str) -> None:
    call = api.generate(steady, **LONG)
    await read_until(call, "delta")
    await kill(api, steady)

    async def restarting() -> bool:
        return (await api.status(steady)).reason == pb.MODEL_STATE_REASON_RESTARTING

    await eventually(restarting)
    await api.unload(steady, 0)
    await stream_fails(call, Code.UNAVAILABLE, "MODEL_UNLOADED")
    assert await api.state(steady) == "AVAILABLE"


async def test_other_models_go_on_while_a_worker_dies(api: Api, steady: str, new_model: NewModel) -> None:
    other = await new_model()
    await api.load(other)
    alone = await api.once(other, temperature=0, max_tokens=500, ignore_eos=True)
    dying = api.generate(steady, **LONG)
    await read_until(dying, "delta")
    living = asyncio.ensure_future(api.once(other, temperature=0, max_tokens=500, ignore_eos=True))
    await kill(api, steady)
    assert (await living).choices[0].text == alone.choices[0].text
    dying.cancel()


async def test_an_idle_model_whose_worker_dies_is_ready_again(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    await api.load(name)
    await restarted(api, name, await kill(api, name))
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


async def test_a_text_call_of_a_dying_worker_is_answered_by_the_next_one(
    api: Api, new_model: NewModel
) -> None:
    name = await new_model()
    pid = (await api.load(name)).status.worker_process_id
    os.kill(pid, signal.SIGSTOP)
    call = api.inference.Tokenize(inference_pb.TokenizeRequest(model=name, text="hello"))
    task = asyncio.ensure_future(call)
    await api.state(name)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        assert (await task).token_ids


async def test_a_stopped_worker_can_still_be_unloaded(api: Api, new_model: NewModel) -> None:
    """It cannot answer Stop: it is killed after its time."""
    name = await new_model()
    pid = (await api.load(name)).status.worker_process_id
    os.kill(pid, signal.SIGSTOP)
    assert (await api.unload(name, 0)).status.state == pb.MODEL_STATE_AVAILABLE
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
