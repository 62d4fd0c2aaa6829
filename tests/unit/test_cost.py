"""The cost model: what it predicts, what fits into a target, and what it learns."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.backend.base import Outcome
from bear_grpc.engine.cost import (
    ENOUGH_S,
    FIRST_SIZES,
    KERNEL_ROWS,
    REPEATS,
    SIZES,
    CostModel,
    measure,
    repacked_is_better,
)
from bear_grpc.testing import FakeBackend, FakeClock
from bear_grpc.types import CostTable, LoadOptions, StepCost

PLAIN = [StepCost(1, 0.027), StepCost(16, 0.13), StepCost(64, 0.31)]


@st.composite
def models(draw: st.DrawFn) -> CostModel:
    """Step times that grow with the size, at some of the sizes."""
    sizes = sorted(draw(st.sets(st.sampled_from(SIZES), min_size=1, max_size=6)))
    steps = draw(st.lists(st.floats(0.001, 1), min_size=len(sizes), max_size=len(sizes)))
    return CostModel(StepCost(size, sum(steps[: place + 1])) for place, size in enumerate(sizes))


def test_predict_without_any_knowledge_is_0():
    assert CostModel().predict(16) == 0


@pytest.mark.parametrize("tokens", [0, -1])
def test_predict_of_no_tokens_is_0(tokens):
    assert CostModel(PLAIN).predict(tokens) == 0


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(1, 0.027), (16, 0.13), (64, 0.31), (40, 0.22), (128, 0.62), (96, 0.465)],
)
def test_predict_is_the_known_or_between_or_in_proportion_beyond(tokens, seconds):
    assert CostModel(PLAIN).predict(tokens) == pytest.approx(seconds)


def test_predict_below_the_smallest_known_size_is_its_time():
    assert CostModel([StepCost(16, 0.1)]).predict(2) == 0.1


def test_model_ignores_times_that_are_none():
    assert CostModel([StepCost(16, 0.0), StepCost(1, -1.0)]).predict(16) == 0


@given(made=models(), one=st.integers(1, 10_000), other=st.integers(1, 10_000))
def test_predict_of_more_tokens_is_never_less(made, one, other):
    low, high = sorted([one, other])
    # Rounding of one interpolation.
    assert made.predict(low) <= made.predict(high) * (1 + 1e-12)


@given(made=models(), target_s=st.floats(0, 5), most=st.integers(0, 600), beside=st.integers(0, 64))
def test_most_fills_the_tile_and_beyond_it_keeps_the_target(made, target_s, most, beside):
    count = made.most(target_s, most, beside=beside)
    fill = min(most, KERNEL_ROWS - beside % KERNEL_ROWS)
    assert fill <= count <= most
    assert count == fill or made.predict(beside + count) <= target_s
    # Above the tile that was begun only whole tiles, or all there is.
    assert count in (fill, most) or beside + count in SIZES


@given(
    made=models(),
    most=st.integers(0, 600),
    beside=st.integers(0, 64),
    targets=st.tuples(*[st.floats(0, 5)] * 2),
)
def test_most_with_a_larger_target_is_never_less(made, most, beside, targets):
    low, high = sorted(targets)
    assert made.most(low, most, beside=beside) <= made.most(high, most, beside=beside)


def test_most_takes_the_largest_size_that_fits():
    made = CostModel(PLAIN)
    assert made.most(0.2, 500) == 32
    assert made.most(0.25, 500) == 48
    assert made.most(0.25, 500, beside=3) == 45
    assert made.most(0.05, 500, beside=3) == 13
    assert made.most(0.05, 5, beside=3) == 5


def test_learn_of_an_unknown_size_takes_the_time_as_it_is():
    made = CostModel()
    made.learn(10, 0.5)
    assert made.predict(12) == 0.5


@pytest.mark.parametrize(("seconds", "weight"), [(0.2, 0.1), (0.05, 0.3)])
def test_learn_moves_towards_the_new_time_and_faster_to_a_shorter_one(seconds, weight):
    made = CostModel([StepCost(16, 0.1)])
    made.learn(16, seconds)
    assert made.predict(16) == pytest.approx(0.1 + weight * (seconds - 0.1))


def test_learn_counts_a_step_for_the_next_size():
    made = CostModel(PLAIN)
    made.learn(25, 0.2)
    assert [cost.tokens for cost in made.known()] == [1, 16, 32, 64]


def test_learn_of_more_than_the_largest_size_counts_for_that():
    made = CostModel()
    made.learn(SIZES[-1] + 1, 9.0)
    assert made.predict(SIZES[-1]) == 9.0


@given(times=st.lists(st.tuples(st.integers(1, 9000), st.floats(0.001, 2)), min_size=1, max_size=20))
def test_learn_stays_within_what_was_seen(times):
    made = CostModel()
    for tokens, seconds in times:
        made.learn(tokens, seconds)
    seen = [seconds for _, seconds in times]
    for cost in made.known():
        assert min(seen) * (1 - 1e-9) <= cost.seconds <= max(seen) * (1 + 1e-9)


@given(made=models())
def test_table_comes_back_through_json_as_the_same_model(made):
    table = CostTable(True, 3, made.known(), "kv_unified=True", made.known())
    again = msgspec.json.decode(msgspec.json.encode(table), type=CostTable)
    assert again == table
    assert (again.repack, again.threads) == (True, 3)
    assert [cost.tokens for cost in again.costs] == sorted(cost.tokens for cost in again.costs)
    assert CostModel(again.costs).known() == table.costs


# ---- measuring --------------------------------------------------------------------------------------


class Slow(FakeBackend):
    """Keeps the sizes of its steps."""

    def __init__(self, clock: FakeClock, seconds: list[float] | None = None, **options: int) -> None:
        self.sizes: list[int] = []
        self._seconds_left = list(seconds or [])
        super().__init__(LoadOptions(**options), clock=clock, seconds_per_step=self._take)

    def _take(self, tokens: int) -> float:
        self.sizes.append(tokens)
        return self._seconds_left.pop(0) if self._seconds_left else tokens / 100


def test_measure_times_the_first_sizes_and_leaves_the_backend_empty():
    clock = FakeClock()
    backend = Slow(clock)
    costs = measure(backend, clock)
    assert [cost.tokens for cost in costs] == [*FIRST_SIZES]
    assert [cost.seconds for cost in costs] == pytest.approx([size / 100 for size in FIRST_SIZES])
    assert backend.kv_used() == 0


def test_measure_takes_the_best_of_a_few():
    clock = FakeClock()
    assert REPEATS == 3
    [cost] = measure(Slow(clock, [0.05, 0.02, 0.03]), clock, [4])
    assert cost.seconds == pytest.approx(0.02)


def test_measure_repeats_a_long_step_only_until_it_has_taken_enough():
    clock = FakeClock()
    backend = Slow(clock, [ENOUGH_S * 2, 0.01])
    [cost] = measure(backend, clock, [4])
    assert cost.seconds == pytest.approx(ENOUGH_S * 2)


@pytest.mark.parametrize("options", [{"batch_tokens": 16}, {"context_length": 16}])
def test_measure_leaves_out_what_the_backend_does_not_take(options):
    clock = FakeClock()
    backend = Slow(clock, **options)
    assert [cost.tokens for cost in measure(backend, clock)] == [1, 2, 16]
    assert max(backend.sizes) == 16


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.NO_KV_ROOM, Outcome.ABORTED])
def test_measure_of_a_step_that_fails_gives_what_was_measured_before_it(outcome):
    clock = FakeClock()
    backend = Slow(clock)
    backend.fail_next(*[Outcome.DONE] * (REPEATS + 1))
    backend.fail_next(outcome, kept=1)
    assert [cost.tokens for cost in measure(backend, clock)] == [1]
    assert backend.kv_used() == 0


@pytest.mark.parametrize(
    ("plain", "repacked", "better"),
    [
        ((0.027, 0.31), (0.025, 0.54), False),
        ((0.027, 0.31), (0.020, 0.32), True),
        ((0.027, 0.31), (0.027, 0.31), False),
    ],
)
def test_repacked_is_better_by_the_product_of_one_stream_and_a_prompt(plain, repacked, better):
    small, large = FIRST_SIZES[0], FIRST_SIZES[-1]

    def table(times: tuple[float, float]) -> list[StepCost]:
        return [StepCost(small, times[0]), StepCost(large, times[1])]

    assert repacked_is_better(table(plain), table(repacked)) is better
