"""Several answers of one request: each by its index with its own seed, and one prompt."""

from __future__ import annotations

import asyncio
from typing import Any

from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import WAIT_S, Api, Code, collect, eventually, fails, kinds, stream_fails, text_of
from tests.rpc.conftest import NewModel

PROMPT = "What is a bear?"


def of(events: list[inference_pb.GenerateResponse], index: int) -> list[inference_pb.GenerateResponse]:
    return [event for event in events if event.index == index]


async def test_each_answer_has_its_own_events_and_one_ending(api: Api, demo: str) -> None:
    events = await collect(
        api.generate(demo, PROMPT, n=3, temperature=1, seed=2**32 - 2, max_tokens=24, ignore_eos=True)
    )
    assert {event.index for event in events} == {0, 1, 2}
    assert len({event.request_id for event in events}) == 1
    for index in range(3):
        assert kinds(of(events, index)) == ["started", "delta", "completed"]
    started = [of(events, index)[0].started for index in range(3)]
    assert [each.sampling.seed for each in started] == [2**32 - 2, 2**32 - 1, 0]
    assert len({each.prompt_token_count for each in started}) == 1
    usages = [of(events, index)[-1].completed.usage for index in range(3)]
    assert [usage.prompt_token_count > 0 for usage in usages] == [True, False, False]
    assert [usage.cached_token_count for usage in usages[1:]] == [0, 0]
    assert [usage.completion_token_count for usage in usages] == [24] * 3
    assert len({text_of(of(events, index)) for index in range(3)}) > 1
    for index in range(3):
        assert of(events, index)[-1].completed.timings.ttft_seconds > 0


async def test_more_answers_than_slots_are_those_of_their_seeds(api: Api, new_model: NewModel) -> None:
    """In a cache of its own, without flash attention: the draws would follow its last digits."""
    load_options = pb.LoadOptions(threads=1, max_sequences=1, flash_attention=False)
    name = await new_model(load_options=load_options)
    options: dict[str, Any] = {"temperature": 1, "max_tokens": 16, "ignore_eos": True}
    together = await api.once(name, PROMPT, n=3, seed=5, **options)
    for index, choice in enumerate(together.choices):
        alone = await api.once(name, PROMPT, seed=5 + index, **options)
        assert choice.text == alone.choices[0].text


async def test_generate_once_has_the_choices_by_index_and_the_prompt_once(api: Api, demo: str) -> None:
    options: dict[str, Any] = {"temperature": 1, "max_tokens": 8, "ignore_eos": True, "logprobs": True}
    answer = await api.once(demo, PROMPT, n=2, seed=7, **options)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [len(choice.tokens) for choice in answer.choices] == [8, 8]
    assert all(choice.finish_reason == inference_pb.FINISH_REASON_LENGTH for choice in answer.choices)
    assert answer.started.sampling.seed == 7
    assert answer.usage.prompt_token_count == answer.started.prompt_token_count
    assert answer.usage.completion_token_count == 16


async def test_greedy_answers_are_all_the_same(api: Api, tiny: str) -> None:
    answer = await api.once(tiny, PROMPT, n=4, temperature=0, max_tokens=8, ignore_eos=True)
    assert len({choice.text for choice in answer.choices}) == 1


async def test_leaving_ends_every_answer(api: Api, steady: str) -> None:
    before = await api.status(steady)
    call = api.generate(steady, PROMPT, n=4, max_tokens=1900, ignore_eos=True)
    async with asyncio.timeout(WAIT_S):
        while not (await call.read()).HasField("delta"):
            pass
    call.cancel()
    status = await api.idle(steady)

    async def counted() -> bool:
        counters = (await api.status(steady)).counters
        return counters.cancelled_sequence_count - before.counters.cancelled_sequence_count == 4

    await eventually(counted)
    assert status.counters.finished_sequence_count == before.counters.finished_sequence_count


async def test_an_error_of_the_request_ends_the_call_once(api: Api, tiny: str) -> None:
    _, status = await stream_fails(
        api.generate(tiny, "x" * 3000, n=3), Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED"
    )
    assert status.metadata["context_length"] == "2048"
    await api.idle(tiny)
    assert (await api.once(tiny, max_tokens=1)).usage.completion_token_count == 1


async def test_answers_count_each_where_requests_wait(api: Api, steady: str) -> None:
    """With room for 512, 32 requests of 16 answers leave none."""
    running = api.generate(steady, max_tokens=1900, ignore_eos=True)
    async with asyncio.timeout(WAIT_S):
        while not (await running.read()).HasField("delta"):
            pass

    async def runs() -> bool:
        return (await api.status(steady)).running_count == 1

    await eventually(runs)
    options: dict[str, Any] = {"max_tokens": 1900, "n": 16, "queue_progress": True}
    calls = [api.generate(steady, **options) for _ in range(32)]
    for call in calls:
        assert (await call.read()).HasField("queued")
    status = await api.status(steady)
    assert (status.running_count, status.waiting_count) == (1, 512)
    await fails(api.once(steady), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    for call in (*calls, running):
        call.cancel()
    await api.idle(steady)
