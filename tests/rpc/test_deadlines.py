"""Deadlines of calls: what a caller gets when its time is too short."""

from __future__ import annotations

from pathlib import Path

import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import inference_service_pb2 as pb
from tests.helpers.rpc import Api, Code, ask, collect, serving, stream_fails, text_of

# Of a call that nobody waits longer for; the slow model answers for much longer.
SHORT_S = 1.5
LONG = {"max_tokens": 1900, "ignore_eos": True}


async def test_stream_completes_just_before_its_deadline(api: Api, steady: str) -> None:
    events = await collect(api.inference.Generate(ask(steady, **LONG), timeout=SHORT_S))
    completed = events[-1].completed
    assert completed.finish_reason == pb.FINISH_REASON_DEADLINE
    assert 0 < completed.usage.completion_token_count < 1900
    assert text_of(events)
    assert completed.timings.total_seconds < SHORT_S


async def test_whole_answer_comes_just_before_its_deadline(api: Api, steady: str) -> None:
    request = pb.GenerateOnceRequest(request=ask(steady, **LONG))
    answer = await api.inference.GenerateOnce(request, timeout=SHORT_S)
    [choice] = answer.choices
    assert choice.finish_reason == pb.FINISH_REASON_DEADLINE
    assert choice.text
    await api.idle(steady)


async def test_prompt_too_long_for_the_deadline_is_refused_with_the_prediction(api: Api, steady: str) -> None:
    call = api.inference.Generate(ask(steady, token_ids=[7] * 1900), timeout=0.3)
    events, status = await stream_fails(call, Code.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE")
    assert events == []
    assert float(status.metadata["predicted_seconds"]) > 0.3
    await api.idle(steady)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deadlines")


async def test_call_without_a_deadline_has_the_servers(
    folder: Path, spawner: Spawner, steady_file: Path
) -> None:
    settings = {"max_request_s": SHORT_S, "allow_path": [steady_file.parent]}
    async with serving(folder, spawner, **settings) as (_, api):
        await api.register("steady", steady_file)
        await api.load("steady")
        answer = await api.once("steady", **LONG)
        assert answer.choices[0].finish_reason == pb.FINISH_REASON_DEADLINE
