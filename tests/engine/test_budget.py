"""How long a step takes: running streams are not held up, and prompts still get on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from bear_grpc.backend.base import Outcome
from bear_grpc.engine.cost import KERNEL_ROWS, CostModel, measure
from bear_grpc.engine.scheduler import ATTENTION_ROWS, DECODE_STEPS, LEAST_TARGET_S, LONE_PREFILL_TOKENS
from bear_grpc.protocol import Delta, Started
from bear_grpc.testing import FakeBackend, FakeClock
from bear_grpc.types import LoadOptions
from tests.engine.harness import Harness

PROMPT = 1500
Seconds = Callable[[int], float]


def tiles(tokens: int) -> float:
    """Kernels that compute whole tiles; one token alone is cheaper."""
    return 0.03 if tokens == 1 else 0.08 * math.ceil(tokens / KERNEL_ROWS)


def smooth(tokens: int) -> float:
    """A fixed part, and one for each token."""
    return 0.02 + 0.005 * tokens


def measured(seconds: Seconds) -> CostModel:
    """What a load finds out."""
    clock = FakeClock()
    return CostModel(measure(FakeBackend(clock=clock, seconds_per_step=seconds), clock))


class Arrival:
    """Three streams decode; then a long prompt comes."""

    def __init__(
        self,
        seconds: Seconds,
        target_s: float = 0.0,
        *,
        costs: CostModel | None = None,
        unified: bool = True,
    ) -> None:
        self.harness = harness = Harness(
            max_sequences=4,
            batch_tokens=512,
            context_length=4096,
            step_target_s=target_s,
            options=LoadOptions(kv_unified=unified),
            costs=costs or measured(seconds),
            seconds_per_step=seconds,
        )
        for id in (1, 2, 3):
            harness.submit(id, f"{id}", max_tokens=1000)
        for _ in range(5):
            harness.step()
        self.arrived = len(harness.steps)
        self.sizes = len(harness.backend.batches)
        harness.submit(4, [7] * PROMPT, max_tokens=2)
        for _ in range(PROMPT):
            harness.step()
            if harness.endings(4):
                return
        raise AssertionError("the prompt does not come to its end")

    def gap_s(self) -> float:
        """The longest time between two tokens of a running stream while the prompt was read."""
        gaps = []
        for id in (1, 2, 3):
            told = [
                time
                for step, time in zip(
                    self.harness.steps[self.arrived - 1 :],
                    self.harness.times[self.arrived - 1 :],
                    strict=True,
                )
                if any(isinstance(event, Delta) and event.id == id for event in step.events)
            ]
            gaps += [after - before for before, after in itertools.pairwise(told)]
        return max(gaps)

    def prefill_counts(self) -> list[int]:
        """Of the prompt, by step, from the first step after its arrival to its last one."""
        counts = [
            sum(rows[0] not in (0, 1, 2) for rows in batch)
            for batch in self.harness.backend.batches[self.sizes :]
        ]
        total = list(itertools.accumulate(counts))
        return counts[: next(at for at, done in enumerate(total, 1) if done >= PROMPT)]


@pytest.mark.parametrize("seconds", [tiles, smooth])
@pytest.mark.parametrize("target_s", [0.0, 0.1, 0.25, 0.6])
def test_long_prompt_never_holds_up_running_streams_beyond_the_target_and_a_tile(seconds, target_s):
    made = Arrival(seconds, target_s)
    target = target_s or max(DECODE_STEPS * seconds(3), LEAST_TARGET_S, seconds(ATTENTION_ROWS))
    assert made.gap_s() <= target + seconds(KERNEL_ROWS)


@pytest.mark.parametrize("seconds", [tiles, smooth])
@pytest.mark.parametrize("target_s", [0.0, 0.1, 0.25, 0.6])
def test_long_prompt_in_a_part_of_its_own_holds_up_running_streams_by_one_step(seconds, target_s):
    """A token comes after a step of prefill and one of decode."""
    made = Arrival(seconds, target_s, unified=False)
    target = target_s or max(DECODE_STEPS * seconds(3), LEAST_TARGET_S, seconds(3) + seconds(ATTENTION_ROWS))
    assert made.gap_s() <= target + seconds(KERNEL_ROWS)


@pytest.mark.parametrize("seconds", [tiles, smooth])
@pytest.mark.parametrize("target_s", [0.0, 0.1, 0.25, 0.6])
def test_long_prompt_gets_on_in_every_step_beside_running_streams(seconds, target_s):
    counts = Arrival(seconds, target_s).prefill_counts()
    # What fills the tile that three decoded tokens have begun is never held back.
    assert min(counts[:-1]) >= (KERNEL_ROWS if target_s else ATTENTION_ROWS) - 3
    assert sum(counts) == PROMPT


@pytest.mark.parametrize("seconds", [tiles, smooth])
@pytest.mark.parametrize("target_s", [0.0, 0.1, 0.25, 0.6])
def test_long_prompt_in_a_part_of_its_own_gets_on_in_every_second_step(seconds, target_s):
    counts = Arrival(seconds, target_s, unified=False).prefill_counts()
    turns = [count > 0 for count in counts]
    assert all(one != other for one, other in itertools.pairwise(turns))
    runs = [count for count in counts if count]
    # One run is what does not fill a tile, the others are not less than the target allows.
    assert min(sorted(runs[:-1])[1:]) >= (KERNEL_ROWS if target_s else ATTENTION_ROWS)
    assert sum(runs) == PROMPT


@pytest.mark.parametrize("unified", [True, False])
def test_long_prompt_takes_fewer_steps_with_a_larger_target(unified):
    steps = [
        len(Arrival(smooth, target_s, unified=unified).prefill_counts()) for target_s in (0.1, 0.25, 0.6)
    ]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 2 * steps[2]


def test_long_prompt_on_costs_that_were_wrong_is_corrected_by_its_own_steps():
    """Measured on an idle machine; now every step takes three times as long."""
    made = Arrival(lambda tokens: 3 * smooth(tokens), 0.6, costs=measured(smooth))
    counts = made.prefill_counts()
    assert counts[-2] < counts[0]
    assert 3 * smooth(counts[-2] + 3) <= 0.6 + 3 * smooth(KERNEL_ROWS)


def test_long_prompt_alone_is_read_in_large_chunks():
    harness = Harness(
        batch_tokens=512,
        context_length=4096,
        costs=measured(smooth),
        seconds_per_step=smooth,
        step_target_s=0.05,
    )
    harness.submit(1, [7] * PROMPT, max_tokens=1)
    harness.run()
    assert {len(batch) for batch in harness.backend.batches[:-1]} == {LONE_PREFILL_TOKENS}


def test_short_prompt_is_answered_while_a_long_one_is_read():
    harness = Harness(
        max_sequences=4,
        batch_tokens=512,
        context_length=4096,
        costs=measured(smooth),
        seconds_per_step=smooth,
    )
    harness.submit(1, [7] * PROMPT, max_tokens=1)
    harness.step()
    harness.submit(2, "short", max_tokens=1)
    harness.step()
    assert len(harness.endings(2)) == 1
    assert [type(event) for event in harness.events(1)] == [Started]
    # The short one leaves the rest of the chunk to the long one.
    assert len(harness.backend.batches[1]) == LONE_PREFILL_TOKENS


def test_step_times_are_learnt_from_real_steps_with_all_threads_only():
    harness = Harness(batch_tokens=64, seconds_per_step=lambda tokens: 0.5, options=LoadOptions(threads=4))
    harness.submit(1, "x" * 16, max_tokens=3)
    harness.step()
    costs = harness.engine.costs()
    assert [(cost.tokens, cost.seconds) for cost in costs] == [(16, pytest.approx(0.5))]
    harness.engine.set_threads(2)
    harness.step()
    assert harness.engine.costs() == costs
    harness.engine.set_threads(4)
    harness.step()
    assert [cost.tokens for cost in harness.engine.costs()] == [1, 16]
    assert harness.backend.threads == 4


def test_step_that_fails_or_is_aborted_teaches_nothing():
    harness = Harness(batch_tokens=64, seconds_per_step=lambda tokens: 0.5)
    harness.submit(1, "x" * 16, max_tokens=3)
    harness.backend.fail_next(Outcome.ABORTED, Outcome.NO_KV_ROOM, Outcome.DONE, Outcome.FAILED)
    harness.step()
    assert harness.engine.costs() == []


# ---- statistics -------------------------------------------------------------------------------------


def streaming(seconds_per_step: float) -> Harness:
    harness = Harness(batch_tokens=64, seconds_per_step=lambda tokens: seconds_per_step)
    harness.submit(1, "abc", max_tokens=50)
    harness.run()
    return harness


def test_stats_of_a_stream_are_told_at_most_every_tenth_of_a_second():
    harness = streaming(0.03)
    told = [time for step, time in zip(harness.steps, harness.times, strict=True) if step.stats is not None]
    # The first step brings Started, the last one Finished.
    assert told[0] == harness.times[0]
    assert told[-1] == harness.times[-1]
    gaps = [after - before for before, after in itertools.pairwise(told)]
    assert min(gaps[:-1]) >= 0.1 - 1e-9
    assert max(gaps) <= 0.1 + 0.03


def test_stats_are_told_in_every_step_that_takes_longer():
    assert all(step.stats is not None for step in streaming(0.11).steps)


def test_stats_are_told_at_once_with_anything_but_a_delta():
    harness = Harness(batch_tokens=64, seconds_per_step=lambda tokens: 0.001)
    harness.submit(1, "abc", max_tokens=50)
    harness.step()
    harness.step()
    assert harness.steps[-1].stats is None
    harness.submit(2, "def", max_tokens=5)
    harness.step()
    started = harness.steps[-2]
    assert [type(event) for event in started.events] == [Started]
    assert (started.stats.submitted, started.stats.running) == (2, 2)
    harness.engine.cancel(2)
    harness.step()
    assert harness.steps[-1].stats.cancelled == 1


def test_stats_are_exact_when_nothing_is_left():
    harness = streaming(0.001)
    assert harness.steps[-1].stats == harness.engine.stats()
    assert harness.engine.stats().decode_tokens == 50


def test_stats_are_exact_when_all_that_runs_waits_for_its_readers():
    harness = Harness(batch_tokens=64, seconds_per_step=lambda tokens: 0.001)
    harness.submit(1, "abc", max_tokens=50, credit=5)
    harness.run()
    last = [step.stats for step in harness.steps if step.stats is not None][-1]
    assert last == harness.engine.stats()


def test_stats_add_up_the_time_inside_and_outside_of_the_backend():
    harness = Harness(batch_tokens=64, seconds_per_step=lambda tokens: 0.25)
    harness.submit(1, "abc", max_tokens=4)
    harness.run()
    stats = harness.engine.stats()
    assert stats.forward_s == pytest.approx(1.0)
    assert (stats.sampling_s, stats.overhead_s) == (0.0, pytest.approx(0.0))


def test_stats_count_every_ending_by_its_kind():
    harness = Harness(max_sequences=2)
    for id in range(5):
        harness.submit(id, f"{id}" * 10, max_tokens=5)
    harness.step()
    harness.engine.cancel(4)
    harness.engine.cancel(0)
    harness.step()
    harness.backend.fail_next(Outcome.FAILED)
    harness.step()
    harness.run()
    stats = harness.engine.stats()
    assert (stats.submitted, stats.cancelled) == (5, 2)
    assert stats.failed >= 1
    assert stats.finished + stats.cancelled + stats.failed == 5
    assert (stats.running, stats.waiting) == (0, 0)


def test_stats_count_prompt_tokens_kept_by_an_aborted_step():
    harness = Harness(batch_tokens=8)
    harness.submit(1, "x" * 20, max_tokens=1)
    harness.backend.fail_next(Outcome.ABORTED, kept=5)
    harness.run()
    assert harness.engine.stats().prefill_tokens == 20
