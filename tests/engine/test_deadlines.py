"""Deadlines: refused at once, dropped from the queue, or ended just before, on a fake clock."""

from __future__ import annotations

import pytest

from bear_grpc.engine.cost import SIZES, CostModel
from bear_grpc.engine.deadlines import LEAST_MARGIN_S, MARGIN_STEPS
from bear_grpc.errors import DeadlineUnreachable
from bear_grpc.protocol import Delta, Finished
from bear_grpc.types import FinishReason, LoadOptions, StepCost
from tests.engine.harness import Harness, alone

STEP_S = 0.02
DEADLINE = "DEADLINE_UNREACHABLE"


def seconds(tokens: int) -> float:
    return STEP_S * tokens


def harness(**changes: object) -> Harness:
    """Steps take what the cost model says, and nothing else takes time."""
    costs = CostModel([StepCost(size, seconds(size)) for size in SIZES[:10]])
    values = {"batch_tokens": 64, "costs": costs, "seconds_per_step": seconds, **changes}
    return Harness(**values)


def reason(made: Harness, id: int) -> str | None:
    error = made.result(id).error
    return None if error is None else error.reason


def test_prompt_that_cannot_be_read_in_time_is_refused_at_once_with_the_prediction():
    made = harness()
    made.submit(1, [1] * 100, deadline_s=made.clock() + seconds(99))
    made.submit(2, [2] * 100, deadline_s=made.clock() + seconds(101))
    made.engine.flush()
    error = made.result(1).error
    assert error.reason == DEADLINE
    assert float(error.metadata["predicted_seconds"]) == pytest.approx(seconds(100))
    assert made.endings(2) == []
    assert made.computed[1] == []


def test_what_waits_before_it_counts_but_not_what_is_cached():
    made = harness(max_sequences=1)
    made.submit(1, [1] * 60, max_tokens=0)
    made.run()
    made.submit(2, [2] * 10, max_tokens=50)
    made.step()
    made.submit(3, [3] * 50)
    made.submit(4, [4] * 10, deadline_s=made.clock() + seconds(59))
    made.submit(5, [1] * 60 + [5], deadline_s=made.clock() + seconds(55))
    made.engine.flush()
    assert reason(made, 4) == DEADLINE
    assert made.endings(5) == []


def test_nothing_is_refused_while_step_times_are_unknown():
    made = Harness()
    made.submit(1, [1] * 100, deadline_s=made.clock() + 0.5)
    made.step()
    assert made.endings(1) == []


def test_request_is_dropped_from_the_queue_when_its_deadline_passes():
    made = harness(max_sequences=1)
    made.submit(1, "a", max_tokens=100)
    made.step()
    made.submit(2, "b", deadline_s=made.clock() + 10 * STEP_S)
    while not made.endings(2):
        assert made.step()
    assert reason(made, 2) == DEADLINE
    assert made.result(2).error.message.startswith("no slot was free")
    assert made.clock() == pytest.approx(made.sequences[2].deadline_s, abs=2 * STEP_S)
    made.run()
    assert made.result(1).text == alone("a", max_tokens=100).text
    assert made.is_clean()


@pytest.mark.parametrize("others", [0, 2])
def test_running_stream_ends_just_before_with_its_text_and_usage(others):
    made = harness()
    end_s = made.clock() + 2.0
    for id in range(2, 2 + others):
        made.submit(id, [id], max_tokens=200)
    made.submit(1, "a", max_tokens=200, deadline_s=end_s)
    made.run()
    [ending] = [event for event in made.events(1) if isinstance(event, Finished)]
    [ended_s] = [t for t, step in zip(made.times, made.steps, strict=True) if ending in step.events]
    longest_s = max(LEAST_MARGIN_S, MARGIN_STEPS * seconds(1 + others)) + seconds(1 + others)
    assert ending.reason is FinishReason.DEADLINE
    assert end_s - longest_s <= ended_s <= end_s - LEAST_MARGIN_S + 1e-9
    text = "".join(event.text for event in made.events(1) if isinstance(event, Delta))
    assert text
    assert alone("a", max_tokens=200).text.startswith(text)
    assert ending.usage.completion_tokens == len(made.result(1).ids)
    for id in range(2, 2 + others):
        assert made.result(id).reason is FinishReason.LENGTH
    assert made.is_clean()


@pytest.mark.parametrize("unified", [True, False])
def test_no_step_is_planned_that_passes_a_streams_margin(unified):
    options = LoadOptions(kv_unified=unified)
    made = harness(max_sequences=2, step_target_s=seconds(64), options=options)
    end_s = made.clock() + 2.0
    made.submit(1, "a", max_tokens=200, deadline_s=end_s)
    made.step()
    made.submit(2, [2] * 200, max_tokens=4)
    made.run()
    [ending] = made.endings(1)
    [ended_s] = [t for t, step in zip(made.times, made.steps, strict=True) if ending in step.events]
    assert ended_s <= end_s - LEAST_MARGIN_S + 1e-9
    assert made.result(1).reason is FinishReason.DEADLINE
    assert made.result(2).reason is FinishReason.LENGTH


def test_preempted_stream_that_waits_ends_with_what_it_has():
    made = harness()
    made.submit(1, "abc", max_tokens=50, deadline_s=made.clock() + 3)
    for _ in range(4):
        made.step()
    made.engine._scheduler.preempt(made.sequences[1])
    made.clock.advance(3.0)
    made.step()
    result = made.result(1)
    assert result.reason is FinishReason.DEADLINE
    assert result.text
    assert made.is_clean()


def test_stalled_stream_is_waited_for_until_its_margin_only():
    made = harness()
    made.submit(1, "a", credit=2, max_tokens=50, deadline_s=made.clock() + 5)
    made.run()
    left_s = made.engine.seconds_to_event()
    assert left_s is not None
    made.clock.advance(left_s)
    made.step()
    assert made.result(1).reason is FinishReason.DEADLINE


def test_without_deadlines_nobody_is_waited_for():
    made = harness()
    made.submit(1, "a", max_tokens=3)
    assert made.engine.seconds_to_event() is None


def test_prediction_is_told_in_seconds():
    assert DeadlineUnreachable(2.5).metadata == {"predicted_seconds": "2.500"}


def test_replay_with_deadlines_gives_the_same_batches():
    def batches() -> list[object]:
        made = harness()
        for id, left_s in enumerate([1.0, 30.0, 2.0, 0.7], 1):
            made.submit(id, [id] * 30, max_tokens=40, deadline_s=made.clock() + left_s)
        made.run()
        return made.backend.batches

    assert batches() == batches()
