"""Which kind of weights is opened, in what order, and what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest

from bear_grpc.backend.base import Backend, Batch, Outcome
from bear_grpc.engine.cost import FIRST_SIZES, REPEATS
from bear_grpc.errors import BackendError
from bear_grpc.protocol import Frame, Load, Progress
from bear_grpc.testing import FakeBackend
from bear_grpc.types import CostTable, KvCacheType, LoadOptions, LoadStage, StepCost
from bear_grpc.worker import opening
from bear_grpc.worker.opening import known, open_measured, refined

CORES = 2
FAST, SLOW = 0.01, 0.02


def table(repack: bool, seconds: float, threads: int = CORES, options: str = "") -> CostTable:
    """Known from an earlier load."""
    costs = [StepCost(size, seconds * size) for size in FIRST_SIZES]
    return CostTable(repack, threads, costs, options, costs)


@dataclasses.dataclass
class Time:
    """The clock that measuring reads."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


class Model(FakeBackend):
    """A backend whose steps take a time that depends on its weights."""

    def __init__(self, options: LoadOptions, time: Time, seconds: float) -> None:
        super().__init__(options)
        self.steps = 0
        self._time, self._seconds = time, seconds

    def forward(self, batch: Batch) -> Outcome:
        self.steps += 1
        self._time.now += self._seconds * batch.size
        return super().forward(batch)


class Bench:
    """Opens a model, and keeps what was opened."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, plain_s: float = SLOW, repacked_s: float = FAST
    ) -> None:
        self.time = Time()
        monkeypatch.setattr(opening, "time", self.time)
        self.seconds = {False: plain_s, True: repacked_s, None: plain_s}
        self.opened: list[Model] = []
        self.frames: list[Frame] = []
        self.has_choice = True

    def factory(self, load: Load, post: Callable[[Frame], None]) -> Backend:
        assert post == self.frames.append
        # llama.cpp holds the memory of one model: never two at once.
        assert all(backend.closed for backend in self.opened)
        options = load.options
        if not self.has_choice:
            options = msgspec.structs.replace(options, repack=None)
        options = options.over(LoadOptions(threads=CORES))
        self.opened.append(Model(options, self.time, self.seconds[options.repack]))
        return self.opened[-1]

    def open(self, *tables: CostTable, **options: object) -> tuple[Model, list[CostTable]]:
        load = Load("m", "/m.gguf", LoadOptions(**options), CORES, cost_tables=list(tables))
        backend, made = open_measured(load, self.factory, self.frames.append)
        assert backend is self.opened[-1]
        assert [each.closed for each in self.opened] == [True] * (len(self.opened) - 1) + [False]
        assert self.opened[-1].kv_used() == 0
        return self.opened[-1], made

    @property
    def kinds(self) -> list[bool | None]:
        """Which kinds of weights were opened, in order."""
        return [backend.options.repack for backend in self.opened]

    @property
    def measured(self) -> list[bool]:
        """Which of them ran steps."""
        # Long steps are not repeated as often.
        runs = {backend.steps for backend in self.opened} - {0}
        assert all(len(FIRST_SIZES) <= steps <= len(FIRST_SIZES) * REPEATS for steps in runs)
        assert self.frames == [Progress(LoadStage.MEASURING, 0.0)] * sum(bool(b.steps) for b in self.opened)
        return [backend.steps > 0 for backend in self.opened]


def lookup(tables: list[CostTable], **options: object) -> CostTable | None:
    """The table for effective options of a load that asked for nothing."""
    return known(tables, Load("m", "/m.gguf", LoadOptions(), CORES), LoadOptions(**options))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def kinds_of(tables: list[CostTable]) -> list[tuple[bool, int]]:
    return sorted((each.repack, each.threads) for each in tables)


def test_unknown_model_measures_both_kinds_and_opens_the_better_one_again(bench):
    _, tables = bench.open()
    assert bench.kinds == [True, False, True]
    assert bench.measured == [True, True, False]
    assert kinds_of(tables) == [(False, CORES), (True, CORES)]


def test_unknown_model_stays_with_plain_weights_where_they_are_better(monkeypatch):
    bench = Bench(monkeypatch, plain_s=FAST, repacked_s=SLOW)
    _, tables = bench.open()
    assert bench.kinds == [True, False]
    assert bench.measured == [True, True]
    assert [cost.seconds for cost in lookup(tables, repack=False, threads=CORES).costs] == [
        pytest.approx(FAST * size) for size in FIRST_SIZES
    ]


@pytest.mark.parametrize(("plain", "repacked", "repack"), [(SLOW, FAST, True), (FAST, SLOW, False)])
def test_model_known_in_both_kinds_is_opened_once_and_not_measured(bench, plain, repacked, repack):
    given = [table(False, plain), table(True, repacked)]
    _, tables = bench.open(*given)
    assert (bench.kinds, bench.measured) == ([repack], [False])
    assert tables == given


@pytest.mark.parametrize(("plain_s", "kinds"), [(FAST / 2, [True, False]), (SLOW, [True, False, True])])
def test_model_known_repacked_measures_the_plain_one(monkeypatch, plain_s, kinds):
    bench = Bench(monkeypatch, plain_s=plain_s)
    _, tables = bench.open(table(True, FAST))
    assert bench.kinds == kinds
    assert bench.measured == [False, True, False][: len(kinds)]
    assert kinds_of(tables) == [(False, CORES), (True, CORES)]


@pytest.mark.parametrize(("repacked_s", "last"), [(FAST, True), (SLOW * 2, False)])
def test_model_known_plain_measures_the_repacked_one_and_not_the_plain_one(monkeypatch, repacked_s, last):
    bench = Bench(monkeypatch, repacked_s=repacked_s)
    _, tables = bench.open(table(False, SLOW))
    assert bench.kinds[0] is True
    assert bench.kinds[-1] is last
    assert bench.measured == [True] + [False] * (len(bench.kinds) - 1)
    assert kinds_of(tables) == [(False, CORES), (True, CORES)]


def test_model_known_plain_stays_open_where_the_repacked_one_turns_out_better(bench):
    bench.open(table(False, SLOW))
    assert bench.kinds == [True]


@pytest.mark.parametrize("repack", [True, False])
def test_kind_that_is_asked_for_is_opened_once_and_measured(bench, repack):
    _, tables = bench.open(repack=repack)
    assert (bench.kinds, bench.measured) == ([repack], [True])
    assert kinds_of(tables) == [(repack, CORES)]


@pytest.mark.parametrize("repack", [True, False])
def test_kind_that_is_asked_for_and_known_is_not_measured_even_if_it_is_worse(bench, repack):
    given = [table(repack, SLOW), table(not repack, FAST)]
    _, tables = bench.open(*given, repack=repack)
    assert (bench.kinds, bench.measured, tables) == ([repack], [False], given)


@pytest.mark.parametrize("repack", [None, True, False])
def test_model_on_a_gpu_is_opened_once_and_not_measured(bench, repack):
    _, tables = bench.open(gpu_layers=20, repack=repack)
    assert (bench.kinds, bench.measured, tables) == ([repack is not False], [False], [])


@pytest.mark.parametrize("given", [[], [table(False, SLOW)]], ids=["unknown", "known"])
def test_backend_without_the_choice_is_opened_once(bench, given):
    bench.has_choice = False
    _, tables = bench.open(*given)
    assert (bench.kinds, bench.measured) == ([None], [not given])
    assert kinds_of(tables) == [(False, CORES)]


def test_tables_of_other_threads_do_not_count_and_are_kept(bench):
    given = [table(False, FAST, threads=1), table(True, SLOW, threads=1)]
    _, tables = bench.open(*given)
    assert bench.measured[:2] == [True, True]
    assert kinds_of(tables) == [(False, 1), (False, CORES), (True, 1), (True, CORES)]


def test_tables_are_looked_up_by_the_threads_that_are_asked_for(bench):
    given = [table(False, FAST, threads=1), table(True, SLOW, threads=1)]
    bench.open(*given, threads=1)
    assert (bench.kinds, bench.measured) == ([False], [False])


def test_tables_given_are_not_changed(bench):
    given = [table(False, SLOW)]
    load = Load("m", "/m.gguf", LoadOptions(), CORES, cost_tables=given)
    open_measured(load, bench.factory, bench.frames.append)
    assert len(given) == 1


def test_error_of_the_factory_is_passed_on(bench):
    def fail(load: Load, post: Callable[[Frame], None]) -> Backend:
        raise BackendError("no context")

    with pytest.raises(BackendError, match="no context"):
        open_measured(Load("m", "/m.gguf", LoadOptions(), CORES), fail, bench.frames.append)


def test_other_options_are_those_asked_for_in_every_opening(bench):
    bench.open(context_length=77, max_sequences=3)
    assert [(b.options.context_length, b.options.max_sequences) for b in bench.opened] == [(77, 3)] * 3


def test_known_needs_kind_and_threads_to_be_the_same():
    tables = [table(False, SLOW, 1), table(True, FAST, 2)]
    assert lookup(tables, repack=True, threads=2) is tables[1]
    assert lookup(tables, repack=None, threads=1) is tables[0]
    assert lookup(tables, repack=True, threads=1) is None


def test_tables_of_other_options_do_not_count_and_are_kept(bench, monkeypatch):
    given = [table(False, FAST), table(True, SLOW)]
    _, tables = bench.open(*given, kv_cache_type=KvCacheType.Q8_0, flash_attention=True)
    assert bench.measured[:2] == [True, True]
    assert tables[:2] == given
    assert {each.options for each in tables[2:]} == {"kv_cache_type=q8_0 flash_attention=True"}
    later = Bench(monkeypatch)
    later.open(*tables, kv_cache_type=KvCacheType.Q8_0, flash_attention=True)
    assert later.measured == [False]


def test_options_that_change_no_step_do_not_count(bench):
    bench.open(table(False, FAST), table(True, SLOW), context_length=77, max_sequences=3, mlock=True)
    assert bench.measured == [False]


def test_choice_is_made_by_what_was_measured_and_not_by_what_work_has_made_of_it(bench):
    """Steps of long contexts take longer: the layout that is used would look worse for it."""
    given = [table(False, FAST), table(True, SLOW)]
    slower = refined(given, given[0], [StepCost(cost.tokens, cost.seconds * 9) for cost in given[0].costs])
    bench.open(*slower)
    assert (bench.kinds, bench.measured) == ([False], [False])


def test_refined_changes_the_costs_of_its_table_and_loses_no_other():
    given = [table(False, FAST), table(True, SLOW), table(True, SLOW, options="kv_unified=True")]
    costs = [StepCost(1, 0.5)]
    newer = refined(given, given[1], costs)
    assert [newer[0], newer[2]] == [given[0], given[2]]
    assert newer[1] == msgspec.structs.replace(given[1], costs=costs)
