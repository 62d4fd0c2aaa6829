"""A request's answers as its reader gets them: by index, each ended once, credit for what was read."""

from __future__ import annotations

import asyncio

import pytest

from bear_grpc.errors import BackendError, SlowConsumer
from bear_grpc.executor.generation import CREDIT_LOT_TOKENS, MAX_MERGED_TOKENS, Event, Generation
from bear_grpc.protocol import Cancel, Credit, Delta, Finished, Frame, Prefilled, Queued, Started, Token
from bear_grpc.types import FinishReason, Timings, Usage


class Sent(list[Frame]):
    """The frames that a generation has sent."""

    def cancelled(self) -> list[int]:
        return [frame.id for frame in self if isinstance(frame, Cancel)]


@pytest.fixture
def sent() -> Sent:
    return Sent()


def make(sent: Sent, n: int = 1) -> Generation:
    return Generation(range(10, 10 + n), 0.0, sent.append)


def finished(id: int) -> Finished:
    return Finished(id, FinishReason.LENGTH, None, Usage(1, 0, 1), Timings(0, 0, 0, 0))


async def read(generation: Generation) -> list[tuple[int, Event]]:
    async with asyncio.timeout(10):
        return [pair async for pair in generation]


async def test_generation_gives_each_event_with_its_index(sent):
    generation = make(sent, 2)
    events = [Started(11, 1, 0, 1), Started(10, 1, 0, 1), Delta(10, "a", 1), Delta(11, "b", 1)]
    for event in [*events, finished(11), finished(10)]:
        generation.push(event)
    found = await read(generation)
    assert [event for index, event in found if index == 0][:2] == [events[1], events[2]]
    assert [event for index, event in found if index == 1][:2] == [events[0], events[3]]
    for index in (0, 1):
        assert [isinstance(event, Finished) for i, event in found if i == index] == [False, False, True]


async def test_generation_ends_after_the_last_answer_and_not_before(sent):
    generation = make(sent, 2)
    reading = asyncio.create_task(read(generation))
    generation.push(finished(10))
    await asyncio.sleep(0)
    assert not generation.ended
    assert not reading.done()
    generation.push(finished(11))
    assert generation.ended
    assert [index for index, _ in await reading] == [0, 1]


async def test_generation_merges_the_text_of_an_answer_even_among_that_of_others(sent):
    generation = make(sent, 2)
    for letter in "abc":
        generation.push(Delta(10, letter, 1))
        generation.push(Delta(11, letter.upper(), 2))
    generation.push(finished(10))
    generation.push(finished(11))
    found = await read(generation)
    assert found[:2] == [(0, Delta(10, "abc", 3)), (1, Delta(11, "ABC", 6))]


async def test_generation_gives_the_answers_in_turn(sent):
    generation = make(sent, 2)
    for id in (10, 11):
        generation.push(Started(id, 1, 0, 1))
        generation.push(Delta(id, "a", 1))
        generation.push(finished(id))
    assert [index for index, _ in await read(generation)] == [0, 1, 0, 1, 0, 1]


async def test_generation_bounds_what_it_merges(sent):
    generation = make(sent)
    many = [Token(1, b"a")] * (MAX_MERGED_TOKENS // 2)
    for _ in range(3):
        generation.push(Delta(10, "a", 0, many))
    generation.push(finished(10))
    found = await read(generation)
    assert [len(event.tokens) for _, event in found[:-1]] == [MAX_MERGED_TOKENS, MAX_MERGED_TOKENS // 2]


async def test_generation_tells_the_latest_progress_only(sent):
    generation = make(sent)
    for done in (1, 2, 3):
        generation.push(Prefilled(10, done, 3))
    generation.push(finished(10))
    assert (await read(generation))[0] == (0, Prefilled(10, 3, 3))


async def test_generation_tells_the_latest_place_only_and_none_once_an_answer_has_begun(sent):
    generation = make(sent, 2)
    for position in (2, 1):
        generation.push(Queued(10, position, 0.5))
    generation.push(Started(11, 1, 0, 1))
    generation.push(Queued(10, 3))  # another worker takes the other answer up again
    for id in (10, 11):
        generation.push(finished(id))
    found = await read(generation)
    assert found[0] == (0, Queued(10, 1, 0.5))
    assert not [event for _, event in found[1:] if isinstance(event, Queued)]


async def test_generation_returns_credit_to_the_answer_that_was_read(sent):
    generation = make(sent, 2)
    generation.push(Delta(11, "a", CREDIT_LOT_TOKENS))
    generation.push(Delta(10, "a", CREDIT_LOT_TOKENS - 1))
    await anext(generation)
    assert sent == []
    await anext(generation)
    assert sent == [Credit(11, CREDIT_LOT_TOKENS)]
    generation.push(finished(10))
    await anext(generation)
    assert sent == [Credit(11, CREDIT_LOT_TOKENS)]


async def test_generation_close_cancels_every_answer_that_has_not_ended(sent):
    generation = make(sent, 3)
    generation.push(finished(11))
    generation.close()
    generation.close()
    assert sent.cancelled() == [10, 12]
    assert generation.ended


async def test_generation_error_of_one_answer_ends_all_after_what_came_before(sent):
    generation = make(sent, 3)
    generation.push(Delta(10, "a", 1))
    generation.push(finished(12))
    generation.fail(SlowConsumer(1.0), 11)
    generation.fail(BackendError("later"), 10)
    generation.push(Delta(10, "too late", 1))
    assert sent.cancelled() == [10]
    found = []
    with pytest.raises(SlowConsumer):
        async for pair in generation:
            found.append(pair)
    assert [(index, type(event)) for index, event in found] == [(0, Delta), (2, Finished)]


async def test_generation_error_wakes_a_reader_that_waits(sent):
    generation = make(sent)
    reading = asyncio.create_task(read(generation))
    await asyncio.sleep(0)
    generation.fail(BackendError("x"), 10)
    with pytest.raises(BackendError):
        await reading


async def test_generation_error_after_the_end_changes_nothing(sent):
    generation = make(sent)
    generation.push(finished(10))
    generation.fail(BackendError("x"), 10)
    assert [type(event) for _, event in await read(generation)] == [Finished]


async def test_generation_ttft_is_of_each_answers_first_text(sent):
    generation = make(sent, 2)
    generation.push(Delta(10, "", 1))
    generation.push(Delta(11, "a", 1))
    generation.push(finished(10))
    generation.push(finished(11))
    times = {
        index: event.timings.ttft_s for index, event in await read(generation) if isinstance(event, Finished)
    }
    assert times[0] == 0
    assert times[1] > 0
