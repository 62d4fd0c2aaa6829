"""Who waits is told its place, nobody else costs anything, prompts that wait are bounded: on a fake clock."""

from __future__ import annotations

import itertools
import random

import pytest

from bear_grpc.engine.cost import SIZES, CostModel
from bear_grpc.engine.places import TELL_S
from bear_grpc.engine.plan import Plan
from bear_grpc.engine.sequence import Phase
from bear_grpc.params import OutputParams
from bear_grpc.protocol import Ended, Queued, Started
from bear_grpc.types import StepCost
from tests.engine.harness import Harness

ASKS = OutputParams(queue_progress=True)
STEP_S = 0.1


def harness(**changes: object) -> Harness:
    """One slot; a step takes 0.1 s and nothing else takes time."""
    values = {"max_sequences": 1, "batch_tokens": 64, "seconds_per_step": lambda rows: STEP_S, **changes}
    return Harness(**values)


def places(made: Harness, id: int) -> list[int]:
    return [event.position for event in made.events(id) if isinstance(event, Queued)]


def told_s(made: Harness, id: int) -> list[float]:
    """When it was told its places."""
    return [
        at_s
        for at_s, step in zip(made.times, made.steps, strict=True)
        for event in step.events
        if isinstance(event, Queued) and event.id == id
    ]


def test_what_starts_at_once_is_told_no_place():
    made = harness(max_sequences=2)
    for id in (1, 2):
        made.submit(id, [id], output=ASKS)
    made.run()
    assert [type(event) for event in made.events(1)][:1] == [Started]
    assert places(made, 1) == places(made, 2) == []


def test_what_has_to_wait_is_told_its_place_before_the_step_is_computed():
    made = harness()
    made.submit(1, [1], max_tokens=50)
    made.step()
    began = made.clock()
    for id in (2, 3, 4):
        made.submit(id, [id], output=ASKS)
    made.step()
    assert [places(made, id) for id in (2, 3, 4)] == [[0], [1], [2]]
    assert told_s(made, 4) == [began]


def test_nobody_is_told_that_does_not_ask():
    made = harness()
    for id in (1, 2, 3):
        made.submit(id, [id], max_tokens=20)
    made.run()
    assert not [event for step in made.steps for event in step.events if isinstance(event, Queued)]


def test_places_go_down_to_the_start_and_are_not_told_after_it():
    made = harness()
    for id in range(1, 6):
        made.submit(id, [id], max_tokens=10, output=ASKS)
    made.run()
    assert [places(made, id) for id in range(1, 6)] == [[], [0], [1, 0], [2, 1, 0], [3, 2, 1, 0]]
    for id in range(2, 6):
        kinds = [type(event) for event in made.events(id)]
        assert kinds.index(Started) == kinds.count(Queued)


def test_a_place_is_told_again_only_if_it_has_changed_and_not_too_often():
    """Nineteen others leave within 2 s: one that waits behind them all is told less often than they leave."""
    made = harness()
    for id in range(1, 21):
        made.submit(id, [id], max_tokens=1)
    made.submit(21, [21], output=ASKS)
    made.run()
    seen = told_s(made, 21)
    assert 3 <= len(seen) <= 5
    assert all(later - sooner >= TELL_S for sooner, later in itertools.pairwise(seen))
    found = places(made, 21)
    assert found == sorted(set(found), reverse=True)


def test_a_change_is_told_within_twice_the_time_even_if_steps_are_short():
    made = harness(context_length=1024, seconds_per_step=lambda rows: 0.01)
    for id in (1, 2, 3, 4):
        made.submit(id, [id], max_tokens=900, output=ASKS)
    made.step()
    for gone in (2, 3):
        made.engine.cancel(gone)
        changed_s = made.clock()
        while made.clock() - changed_s <= 2 * TELL_S and len(places(made, 4)) < gone:
            made.step()
    assert places(made, 4) == [2, 1, 0]


def test_places_count_requests_and_not_their_answers():
    made = harness()
    made.submit(1, [1], max_tokens=30)
    for id in (2, 3, 4):
        made.submit(id, [2], request=2, output=ASKS, max_tokens=2)
    made.submit(5, [5], output=ASKS)
    made.step()
    assert [places(made, id) for id in range(2, 6)] == [[0], [], [], [1]]
    while not made.endings(2):
        made.step()
    # Answers of it still wait, but it has begun.
    made.run()
    assert [places(made, id) for id in (2, 3, 4)] == [[0], [], []]
    assert places(made, 5) == [1, 0]


def test_a_resumed_sequence_counts_before_others_and_is_told_nothing():
    made = harness()
    made.submit(1, [1], max_tokens=30)
    resumed = made.submit(2, [2], max_tokens=30, output=ASKS)
    resumed.tokens.append(7)  # drawn by another worker
    made.submit(3, [3], output=ASKS)
    made.step()
    assert (places(made, 2), places(made, 3)) == ([], [1])


def test_one_that_is_preempted_waits_unseen_but_counts_before_others(monkeypatch):
    made = harness()
    for id in (8, 9):
        made.submit(id, [id], max_tokens=20)
    first = made.submit(1, [1], max_tokens=20, output=ASKS)
    made.step()
    for id in (8, 9):
        made.engine.cancel(id)
    made.step()
    assert first.is_started
    made.engine._scheduler.preempt(first)
    made.submit(2, [2], output=ASKS)
    made.clock.advance(TELL_S)
    # Nobody gets the slot in this step.
    monkeypatch.setattr(made.engine._scheduler, "plan", lambda *times: Plan((), ()))
    made.step()
    assert (places(made, 1), places(made, 2)) == ([1], [1])


def test_the_wait_is_unknown_until_something_has_left_and_then_near_the_truth():
    made = harness()
    for id in range(1, 41):
        made.submit(id, [id], max_tokens=10, output=ASKS)
    made.run()
    starts = {
        event.id: at_s
        for at_s, step in zip(made.times, made.steps, strict=True)
        for event in step.events
        if isinstance(event, Started)
    }
    assert all(event.estimated_wait_s == 0 for event in made.events(40)[:1])
    late = [
        (event.estimated_wait_s, starts[event.id] - at_s)
        for at_s, step in zip(made.times, made.steps, strict=True)
        for event in step.events
        if isinstance(event, Queued) and at_s - made.times[0] > 15
    ]
    assert len(late) > 100
    for estimated_s, waited_s in late:
        assert estimated_s == pytest.approx(waited_s, rel=0.25, abs=1.1)


def test_the_queue_costs_nothing_while_nobody_asks(monkeypatch):
    made = harness()
    for id in (1, 2, 3):
        made.submit(id, [id], max_tokens=20)
    monkeypatch.setattr(made.engine._scheduler, "ahead_of", lambda sequence: pytest.fail("looked"))
    made.run()
    assert made.is_clean()


def test_places_are_told_while_nothing_can_be_computed():
    """The only stream is not read: the engine is asked again when a change is to be told."""
    made = harness()
    made.submit(1, [1], max_tokens=200, credit=1)
    for id in (2, 3):
        made.submit(id, [id], output=ASKS)
    while made.step():
        pass
    assert places(made, 3) == [1]
    made.engine.cancel(2)
    made.clock.advance(made.engine.seconds_to_event())
    made.clock.advance(TELL_S)
    made.step()
    assert places(made, 3) == [1, 0]
    made.engine.cancel(3)
    made.clock.advance(1)
    assert made.engine.seconds_to_event() > TELL_S  # of the stream that is not read


@pytest.mark.parametrize("seed", range(20))
def test_places_are_true_whatever_happens(seed):
    """A place is told at most twice a second, is right when it is told, and never told after the start."""
    rng = random.Random(seed)
    made = harness(max_sequences=2, context_length=64, seconds_per_step=lambda rows: rng.choice((0.01, 0.2)))
    alive: list[int] = []
    for step in range(150):
        if rng.random() < 0.3:
            first = 10 * step + 1
            for id in range(first, first + rng.choice((1, 1, 3))):
                made.submit(id, [id % 50], request=first, output=ASKS, max_tokens=rng.choice((1, 4, 12)))
                alive.append(id)
        if alive and rng.random() < 0.1:
            made.engine.cancel(alive.pop(rng.randrange(len(alive))))
        before = len(made.steps)
        made.step()
        for event in (event for step in made.steps[before:] for event in step.events):
            if isinstance(event, Queued) and made.sequences[event.id].phase is Phase.WAITING:
                ahead = made.engine._scheduler.ahead_of(made.sequences[event.id])
                assert event.position == len({other.request for other in ahead})
    made.run()
    for id in made.sequences:
        kinds = [type(event) for event in made.events(id)]
        assert Queued not in kinds[kinds.index(Started) :] if Started in kinds else True
        seen = told_s(made, id)
        assert all(later - sooner >= TELL_S for sooner, later in itertools.pairwise(seen))
    assert made.is_clean()
    assert made.engine._places.tokens == 0


# The bound in tokens


def refusal(made: Harness, id: int) -> dict[str, str] | None:
    made.engine.flush()
    ended = [event for event in made.events(id) if isinstance(event, Ended)]
    if not ended or ended[0].error is None:
        return None
    assert ended[0].error.reason == "QUEUE_FULL"
    return ended[0].error.metadata


def test_more_tokens_than_may_wait_are_refused_with_the_numbers():
    made = harness(max_waiting_tokens=100)
    made.submit(1, [1] * 60, max_tokens=20)
    made.step()
    made.submit(2, [2] * 60)
    made.submit(3, [3] * 40)
    made.submit(4, [4])
    assert refusal(made, 2) is refusal(made, 3) is None
    assert refusal(made, 4) == {
        "model": "fake",
        "unit": "tokens",
        "limit": "100",
        "waiting": "100",
        "asked": "1",
    }
    made.run()
    made.submit(5, [5] * 100)
    assert refusal(made, 5) is None
    assert made.engine.stats().failed == 1
    made.run()
    assert made.is_clean()


def test_an_empty_queue_takes_a_prompt_of_any_length():
    made = harness(max_waiting_tokens=10)
    made.submit(1, [1] * 100)
    made.submit(2, [2])
    assert refusal(made, 1) is None
    assert refusal(made, 2) is not None
    made.step()
    made.submit(3, [3] * 100)
    assert refusal(made, 3) is None


@pytest.mark.parametrize("how", ["start", "cancel", "deadline"])
def test_tokens_count_until_their_sequence_waits_no_longer(how):
    # What a step takes is known: a deadline is never called out of reach for its prompt.
    costs = CostModel([StepCost(size, 0.01) for size in SIZES[:10]])
    made = harness(max_waiting_tokens=100, costs=costs)
    made.submit(1, [1], max_tokens=8)
    made.step()
    made.submit(2, [2] * 100, deadline_s=made.clock() + 0.3 if how == "deadline" else 0.0)
    made.submit(3, [3])
    assert refusal(made, 3) is not None
    if how == "cancel":
        made.engine.cancel(2)
    elif how == "start":
        made.engine.cancel(1)
    while not made.endings(2) and not made.sequences[2].is_started:
        made.step()
    made.submit(4, [4] * 100)
    assert refusal(made, 4) is None


def test_the_answers_of_a_request_count_its_prompt_once_and_are_refused_together():
    made = harness(max_waiting_tokens=100)
    made.submit(1, [1], max_tokens=8)
    made.step()
    for id in (2, 3, 4):
        made.submit(id, [2] * 60, request=2)
    made.submit(5, [5] * 40)
    assert [refusal(made, id) for id in (2, 3, 4, 5)] == [None] * 4
    made.submit(6, [6])
    assert refusal(made, 6) is not None


def test_what_another_worker_had_taken_is_never_refused_but_counts():
    made = harness(max_waiting_tokens=100)
    made.submit(1, [1] * 90, was_taken=True)
    made.submit(2, [2] * 90, was_taken=True)
    made.submit(3, [3])
    assert refusal(made, 2) is None
    assert refusal(made, 3)["waiting"] == "180"


def test_the_retry_of_a_refused_prompt_follows_how_quickly_prompts_start():
    made = harness(max_waiting_tokens=200)
    for id in range(1, 41):
        made.submit(id, [id] * 50, max_tokens=10, was_taken=True)
    for _ in range(350):
        made.step()
    waiting = made.engine._places.tokens
    assert waiting > 200
    made.submit(100, [3] * 50)
    made.engine.flush()
    [ended] = made.endings(100)
    # A request a second, and each takes 50 tokens away.
    assert ended.error.retry_after_s == pytest.approx((waiting + 50 - 200) / 50, rel=0.3)


def test_stats_tell_who_had_to_wait_and_for_how_long():
    made = harness()
    made.submit(1, [1], max_tokens=10)
    made.run()
    assert (made.engine.stats().left_queue, made.engine.stats().queue_s) == (0, 0)
    for id in (2, 3, 4):
        made.submit(id, [id], max_tokens=10)
    made.clock.advance(5)  # before the first plan nobody has been left behind
    made.run()
    stats = made.engine.stats()
    assert stats.left_queue == 2
    assert stats.queue_s == pytest.approx(2 * 10 * STEP_S, rel=0.1)
    made.clock.advance(100)
    assert made.engine.stats().queue_s == stats.queue_s
