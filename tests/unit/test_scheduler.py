"""The scheduler: slots, budgets and order hold in every history of submits, steps and ends."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bear_grpc.backend.base import Batch, Outcome
from bear_grpc.engine.cost import KERNEL_ROWS, CostModel
from bear_grpc.engine.kv import FEWEST_AWAITED, KvCache
from bear_grpc.engine.plan import Budget, Plan, PlanItem
from bear_grpc.engine.scheduler import (
    ATTENTION_ROWS,
    DECODE_STEPS,
    LEAST_TARGET_S,
    LONE_PREFILL_TOKENS,
    PROMPTS_AT_ONCE,
    Scheduler,
)
from bear_grpc.engine.sequence import MOVES, Phase, Sequence
from bear_grpc.engine.stop import TextMachine
from bear_grpc.params import OutputParams, SamplingParams, StopParams
from bear_grpc.testing import FakeBackend
from bear_grpc.types import LoadOptions, StepCost

TERMINAL = [Phase.FINISHED, Phase.CANCELLED, Phase.FAILED]
SLOTS, CONTEXT = 3, 256
# A step of 16 rows costs nearly the same as one of 9; from there on it is in proportion.
COSTS = [StepCost(1, 0.03), StepCost(2, 0.05), StepCost(16, 0.13), StepCost(64, 0.31), StepCost(512, 2.5)]
LOGPROBS = OutputParams(echo=True, logprobs=True)
FIRST_TOKEN = itertools.count()


def sequence(id: int, tokens: int | list[int] = 4, *, credit: int = 100, **changes: object) -> Sequence:
    """A number of tokens gives a prompt that begins like no other."""
    if isinstance(tokens, int):
        tokens = [next(FIRST_TOKEN) % 251] * tokens
    return Sequence(
        id=id,
        tokens=list(tokens),
        sampling=SamplingParams(),
        stop=StopParams(),
        max_tokens=8,
        text=TextMachine(),
        received_s=0.0,
        credit=credit,
        **changes,
    )


class Bench:
    """A scheduler on a fake backend that computes its plans."""

    def __init__(
        self,
        *,
        max_sequences: int = SLOTS,
        batch_tokens: int = 512,
        target_s: float = 0.0,
        max_outputs: int | None = None,
        costs: list[StepCost] | None = None,
        unified: bool = True,
        can_cut: bool = True,
        context: int = CONTEXT,
    ) -> None:
        options = LoadOptions(
            max_sequences=max_sequences,
            batch_tokens=batch_tokens,
            context_length=context,
            kv_unified=unified,
        )
        self.backend = FakeBackend(options, can_cut=can_cut, max_outputs=max_outputs)
        self.kv = KvCache(self.backend)
        self.cost = CostModel(costs or [])
        self.budget = Budget(max_sequences, batch_tokens, self.backend.max_outputs, target_s)
        self.scheduler = Scheduler(
            self.kv, self.cost, self.budget, unified=self.backend.kv.unified, can_cut=can_cut
        )
        self.batch = Batch(batch_tokens)

    def submit(self, *sequences: Sequence) -> None:
        for each in sequences:
            self.scheduler.submit(each)

    def run(self) -> Plan:
        """One step, in which every sequence that has logits draws a token."""
        plan = self.scheduler.plan()
        self.compute(plan)
        return plan

    def compute(self, plan: Plan) -> None:
        if not plan.items:
            return
        assert self.kv.make_room(sum(item.count for item in plan.items))
        self.batch.clear()
        for item in plan.items:
            every = item.sequence.output.wants_prompt_logprobs and item.start < item.sequence.num_prompt
            place = item.sequence.sequence_id
            self.batch.extend(place, item.start, item.tokens, item.wants_logits, every=every)
        assert self.backend.forward(self.batch) is Outcome.DONE
        drawn = [item.sequence for item in plan.items if item.wants_logits]
        self.scheduler.commit(plan.items)
        for each in drawn:
            each.tokens.append(0)


def shape(plan: Plan) -> list[tuple[int, int, int]]:
    """What is computed, by sequence."""
    return sorted((item.sequence.id, item.start, item.count) for item in plan.items)


def parts(plan: Plan) -> tuple[list[PlanItem], list[PlanItem]]:
    """Decode and prefill."""
    decode = [item for item in plan.items if item.sequence.phase is Phase.DECODE]
    return decode, [item for item in plan.items if item.sequence.phase is Phase.PREFILL]


class Histories(RuleBasedStateMachine):
    """Any order of submits, steps, credit, preemptions and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = itertools.count()
        self.live: list[Sequence] = []
        self.admitted: list[int] = []
        # Of parts: plans in a row without what could have been in them, the last by sequence.
        self.without_prefill = self.without_oldest = 0
        self.not_decoded: dict[int, int] = {}

    @initialize(
        target_s=st.sampled_from([0.0, 0.01, 0.16, 0.3]),
        batch_tokens=st.sampled_from([4, 24, 200]),
        kind=st.sampled_from([(True, True), (False, True), (False, False)]),
        outputs=st.sampled_from([SLOTS, SLOTS + 6, None]),
    )
    def begin(self, target_s: float, batch_tokens: int, kind: tuple[bool, bool], outputs: int | None) -> None:
        unified, can_cut = kind
        self.bench = Bench(
            target_s=target_s,
            batch_tokens=batch_tokens,
            max_outputs=outputs,
            costs=COSTS,
            unified=unified,
            can_cut=can_cut,
        )
        self.scheduler = self.bench.scheduler

    @rule(
        start=st.sampled_from([0, 20, 50, 90]),
        rest=st.integers(1, 60),
        same=st.booleans(),
        logprobs=st.sampled_from([False, False, True]),
    )
    def submit(self, start: int, rest: int, same: bool, logprobs: bool) -> None:
        id = next(self.ids)
        # Some share all but the last token, others only the beginning.
        tokens = [7] * start + [8 if same else 10 + id % 200] * rest
        output = LOGPROBS if logprobs else OutputParams()
        self.live.append(sequence(id, tokens, output=output))
        self.scheduler.submit(self.live[-1])

    @precondition(lambda self: self.live)
    @rule(place=st.integers(0, 9), phase=st.sampled_from([Phase.CANCELLED, Phase.FAILED]))
    def end(self, place: int, phase: Phase) -> None:
        which = self.live.pop(place % len(self.live))
        self.scheduler.end(which, phase, keep=phase is Phase.CANCELLED)
        assert which.sequence_id == -1

    @precondition(lambda self: any(each.num_completion for each in self.live))
    @rule(place=st.integers(0, 9), credit=st.integers(0, 1))
    def set_credit(self, place: int, credit: int) -> None:
        read = [each for each in self.live if each.num_completion]
        read[place % len(read)].credit = credit

    @precondition(lambda self: len(self.scheduler.running) > 1)
    @rule()
    def preempt(self) -> None:
        victim = self.scheduler.youngest()
        assert victim.order == max(each.order for each in self.scheduler.running.values())
        self.scheduler.preempt(victim)
        assert (victim.phase, victim.num_computed, victim.sequence_id) == (Phase.WAITING, 0, -1)
        head = self.scheduler.waiting.head(0.0)
        # Before it come only those that have begun and came earlier.
        assert head is victim or not victim.is_started or (head.is_started and head.arrival < victim.arrival)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            plan = self.scheduler.plan()
            self.admitted += [each.id for each in plan.started]
            self.check(plan)
            self.bench.compute(plan)
            for each in [item.sequence for item in plan.items]:
                if each.num_completion >= each.max_tokens:
                    self.live.remove(each)
                    self.scheduler.end(each, Phase.FINISHED, keep=True)

    def check(self, plan: Plan) -> None:
        decode, prefill = parts(plan)
        running = self.scheduler.running.values()
        assert len({item.sequence.id for item in plan.items}) == len(plan.items)
        for item in plan.items:
            assert item.count >= 1
            assert item.sequence.leader is None
            assert item.start == item.sequence.num_computed
            assert item.start + item.count <= len(item.sequence.tokens)
        ready = {each.id for each in running if each.phase is Phase.DECODE and each.credit > 0}
        prompts = [
            each
            for each in running
            if each.phase is Phase.PREFILL and each.leader is None and each.credit > 0
        ]
        self.check_size(len(ready), len(prompts), sum(item.count for item in prefill))
        if self.bench.backend.kv.unified:
            assert {item.sequence.id for item in decode} == ready
            self.check_progress(prefill, self.bench.budget.batch_tokens - len(decode))
        else:
            assert {item.sequence.id for item in decode} == (set() if prefill else ready)
            self.check_turns(prefill, ready, prompts)
        order = [item.sequence.sequence_id for item in plan.items]
        assert order == sorted(order)

    def check_size(self, decode: int, prompts: int, prefill: int) -> None:
        """Of prefill beside so many that decode, in the same step or in steps of their own."""
        budget, cost = self.bench.budget, self.bench.cost
        unified = self.bench.backend.kv.unified
        assert prefill + (decode if unified else 0) <= budget.batch_tokens
        if not decode:
            assert prefill <= LONE_PREFILL_TOKENS
            return
        beside = decode if unified else 0
        least = KERNEL_ROWS - beside % KERNEL_ROWS
        if not budget.target_s:
            least = max(least, ATTENTION_ROWS * min(prompts, PROMPTS_AT_ONCE) - beside % ATTENTION_ROWS)
        target_s = budget.target_s or max(DECODE_STEPS * cost.predict(decode), LEAST_TARGET_S)
        if unified:
            assert prefill <= least or cost.predict(decode + prefill) <= target_s
        else:
            assert prefill <= least or cost.predict(decode) + cost.predict(prefill) <= target_s

    def check_turns(self, prefill: list[PlanItem], ready: set[int], prompts: list[Sequence]) -> None:
        """Nobody is left out twice in a row: who decodes, who reads, and of those the oldest."""
        self.not_decoded = {id: self.not_decoded.get(id, 0) + 1 if prefill else 0 for id in ready}
        assert max(self.not_decoded.values(), default=0) <= 1
        self.without_prefill = self.without_prefill + 1 if prompts and not prefill else 0
        assert self.without_prefill <= 1
        if prefill:
            oldest = min(prompts, key=lambda each: each.order)
            has_oldest = any(item.sequence is oldest for item in prefill)
            self.without_oldest = 0 if has_oldest else self.without_oldest + 1
            assert self.without_oldest <= 1
            # Equal runs of rests that were as long, so that they are computed together.
            assert len({(item.sequence.num_left, item.count) for item in prefill}) == 1

    def check_progress(self, prefill: list[PlanItem], room: int) -> None:
        """The oldest has at least half of the prefill, or all that it needs."""
        waiting = [
            each
            for each in self.scheduler.running.values()
            if each.phase is Phase.PREFILL and each.leader is None
        ]
        if not waiting or not room or any(each.credit <= 0 for each in waiting):
            return
        oldest = min(waiting, key=lambda each: each.order)
        counts = {item.sequence.id: item.count for item in prefill}
        got, total = counts.get(oldest.id, 0), sum(counts.values())
        # Rows with logits and exact copies cut a chunk short.
        is_free = self.bench.backend.kv.can_cut and not oldest.output.wants_prompt_logprobs
        assert got >= 1
        assert not is_free or got == oldest.num_left or 2 * got >= total

    @invariant()
    def no_place_is_held_twice(self) -> None:
        held = [each.sequence_id for each in self.scheduler.running.values()]
        assert len(set(held)) == len(held) <= SLOTS
        assert all(0 <= id < self.bench.backend.kv.sequence_ids for id in held)

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        places = [each.id for each in self.scheduler.sequences()]
        assert sorted(places) == sorted(each.id for each in self.live)
        assert all(each.phase is Phase.WAITING for each in self.scheduler.waiting)
        assert all(each.sequence_id == -1 for each in self.scheduler.waiting)

    @invariant()
    def each_follows_one_that_runs_before_it(self) -> None:
        for each in self.scheduler.running.values():
            if each.leader is not None:
                assert each.leader.id in self.scheduler.running
                assert each.leader.order < each.order
                assert each.num_computed == 0
                assert each.leader.tokens[: each.share_at] == each.tokens[: each.share_at]

    @invariant()
    def each_begins_once(self) -> None:
        assert len(set(self.admitted)) == len(self.admitted)

    @invariant()
    def cells_are_those_of_the_computed_tokens(self) -> None:
        for each in self.scheduler.running.values():
            assert self.bench.backend.kv_tokens(each.sequence_id) == each.tokens[: each.num_computed]

    def teardown(self) -> None:
        """What is left comes to its end: nobody waits for somebody who does not go on."""
        for each in self.live:
            each.credit = 100
        for _ in range(3000):
            if not self.live:
                return
            self.step(1)
        raise AssertionError(f"{len(self.live)} sequences do not end")


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=80, stateful_step_count=30)


@pytest.mark.slow
class TestManyHistories(Histories.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=60)


# ---- slots and order --------------------------------------------------------------------------------


def test_plan_without_sequences_is_empty():
    assert Bench().scheduler.plan() == Plan((), ())


def test_plan_gives_free_slots_to_the_head_of_the_queue():
    made = Bench()
    made.submit(*map(sequence, range(5)))
    assert [each.id for each in made.scheduler.plan().started] == [0, 1, 2]
    assert [each.id for each in made.scheduler.waiting] == [3, 4]


def test_plan_head_of_the_queue_without_room_is_not_overtaken():
    made = Bench(max_sequences=3)
    options = LoadOptions(max_sequences=3, context_length=CONTEXT, kv_cache_tokens=CONTEXT, batch_tokens=512)
    made.backend = FakeBackend(options)
    made.kv = KvCache(made.backend)
    made.scheduler = Scheduler(made.kv, made.cost, made.budget, unified=True, can_cut=True)
    first = sequence(0, 120)
    made.submit(first, sequence(1, 130), sequence(2, 4))
    assert [each.id for each in made.run().started] == [0]
    assert [each.id for each in made.run().started] == []
    made.scheduler.end(first, Phase.CANCELLED, keep=True)
    assert [each.id for each in made.run().started] == [1, 2]


def test_end_of_a_running_sequence_gives_its_slot_to_the_next():
    made = Bench(max_sequences=1)
    first, second = sequence(0), sequence(1)
    made.submit(first, second)
    made.run()
    made.scheduler.end(first, Phase.CANCELLED, keep=True)
    assert made.scheduler.plan().started == (second,)


def test_end_of_a_waiting_sequence_leaves_no_trace():
    made = Bench()
    waiting = sequence(0)
    made.submit(waiting)
    made.scheduler.end(waiting, Phase.CANCELLED, keep=True)
    assert made.scheduler.plan() == Plan((), ())


@pytest.mark.parametrize("phase", TERMINAL)
@pytest.mark.parametrize("again", TERMINAL)
def test_end_twice_is_an_error(phase, again):
    made = Bench()
    ended = sequence(0, 2)
    made.submit(ended)
    made.run()
    made.scheduler.end(ended, phase, keep=True)
    with pytest.raises(RuntimeError, match="sequence 0"):
        made.scheduler.end(ended, again, keep=True)


def test_end_of_a_waiting_sequence_in_a_phase_that_it_cannot_reach_is_an_error_that_changes_nothing():
    made = Bench()
    waiting = sequence(0)
    made.submit(waiting)
    with pytest.raises(RuntimeError, match="WAITING -> DECODE"):
        made.scheduler.end(waiting, Phase.DECODE, keep=True)
    assert [*made.scheduler.waiting] == [waiting]
    assert waiting.phase is Phase.WAITING


def test_moves_terminal_phases_have_no_exit_and_all_others_can_be_cancelled_and_fail():
    assert {phase for phase, exits in MOVES.items() if not exits} == {*TERMINAL}
    assert all({Phase.CANCELLED, Phase.FAILED} <= exits for exits in MOVES.values() if exits)
    assert {*MOVES} == {*Phase}


# ---- the size of a step -----------------------------------------------------------------------------


def test_plan_with_nothing_decoding_prefills_128_tokens():
    made = Bench()
    made.submit(sequence(0, 200))
    assert shape(made.run()) == [(0, 0, 128)]
    assert shape(made.run()) == [(0, 128, 72)]


def test_plan_decode_tokens_shrink_the_prefill_when_the_batch_is_full():
    made = Bench(batch_tokens=3)
    made.submit(sequence(0, 1), sequence(1, 1))
    made.run()
    made.submit(sequence(2, 9))
    assert shape(made.run()) == [(0, 1, 1), (1, 1, 1), (2, 0, 1)]


def test_plan_full_of_decode_tokens_prefills_nothing():
    made = Bench(max_sequences=2, batch_tokens=1)
    made.submit(sequence(0, 1))
    made.run()
    made.submit(sequence(1, 1))
    assert shape(made.run()) == [(0, 1, 1)]


def one_decoding(**changes: object) -> Bench:
    made = Bench(costs=COSTS, **changes)
    made.submit(sequence(0, 1))
    made.run()
    return made


@pytest.mark.parametrize(
    ("target_s", "prefill"),
    [
        (0.001, 15),  # only the tile that the decoded token has begun
        (0.2, 31),
        (0.26, 47),
        (0.35, 63),
        (9.0, 200),
        (0.0, 63),  # chosen: the larger tile of attention
    ],
)
def test_plan_beside_a_decoding_one_prefills_what_the_target_allows(target_s, prefill):
    made = one_decoding(target_s=target_s)
    made.submit(sequence(1, 200))
    assert shape(made.run()) == [(0, 1, 1), (1, 0, prefill)]


@pytest.mark.parametrize(("prompts", "prefill"), [(1, 63), (2, 127), (3, 127)])
def test_plan_beside_a_decoding_one_prefills_a_tile_for_each_of_two_prompts(prompts, prefill):
    made = one_decoding(max_sequences=4)
    made.submit(*(sequence(id, 200) for id in range(1, prompts + 1)))
    assert sum(count for id, _, count in shape(made.run()) if id) == prefill


def test_plan_leaves_out_a_sequence_without_credit_and_keeps_its_slot():
    made = Bench()
    made.submit(sequence(0, 1, credit=1))
    made.run()
    made.scheduler.running[0].credit = 0
    assert shape(made.scheduler.plan()) == []
    assert [*made.scheduler.running] == [0]


def test_plan_wants_logits_of_the_last_chunk_only():
    made = Bench()
    made.submit(sequence(0, 130))
    assert [item.wants_logits for item in made.run().items] == [False]
    assert [item.wants_logits for item in made.scheduler.plan().items] == [True]


def test_plan_is_in_the_order_of_the_sequence_ids():
    """Only neighbouring ids of a split cache are computed together."""
    made = Bench(unified=False)
    first, second = sequence(0), sequence(1)
    made.submit(first, second)
    made.run()
    made.scheduler.end(first, Phase.CANCELLED, keep=False)
    made.submit(sequence(2))
    plans = [made.run() for _ in range(3)]
    assert [shape(plan) for plan in plans[:2]] == [[(1, 4, 1)], [(2, 0, 4)]]
    assert [item.sequence.id for item in plans[2].items] == [2, 1]
    assert [item.sequence.sequence_id for item in plans[2].items] == [0, 1]


# ---- parts ------------------------------------------------------------------------------------------


def one_decoding_in_parts(**changes: object) -> Bench:
    """The next step is for prefill, if there is any."""
    made = one_decoding(unified=False, context=2048, **changes)
    assert shape(made.run()) == [(0, 1, 1)]
    return made


@pytest.mark.parametrize(
    ("target_s", "prefill"),
    [
        (0.001, 16),
        (0.23, 32),  # with what the step of decode takes, 0.22 s
        (0.35, 64),
        (1.0, 192),
        (0.0, 64),
    ],
)
def test_plan_of_parts_pays_for_decode_and_prefill_one_after_the_other(target_s, prefill):
    made = one_decoding_in_parts(target_s=target_s)
    made.submit(sequence(1, 10 * ATTENTION_ROWS))
    assert shape(made.run()) == [(1, 0, prefill)]


def test_plan_of_parts_decodes_and_reads_by_turns():
    made = one_decoding_in_parts()
    made.submit(sequence(1, 5 * ATTENTION_ROWS))
    counts = [{id: count for id, _, count in shape(made.run())} for _ in range(8)]
    assert counts == [{1: 64}, {0: 1}] * 4


def test_plan_of_parts_with_nothing_to_decode_reads_in_every_step():
    made = Bench(unified=False)
    made.submit(sequence(0, 250))
    assert [shape(made.run()) for _ in range(3)] == [[(0, 0, 122)], [(0, 122, 128)], [(0, 250, 1)]]


def test_plan_of_parts_reads_the_oldest_and_the_shortest_rest_by_turns():
    made = Bench(unified=False)
    oldest = sequence(0, 250)
    made.submit(oldest, sequence(1, 100), sequence(2, 90))
    reads = [read for _ in range(7) for read in shape(made.run()) if read[2] > 1]
    assert reads == [(0, 0, 122), (2, 0, 90), (0, 122, 128), (1, 0, 100)]


def test_plan_of_parts_reads_rests_that_are_as_long_together():
    made = Bench(unified=False, max_sequences=5)
    made.submit(sequence(0, 40), sequence(1, 50), sequence(2, 40), sequence(3, 40), sequence(4, 40))
    assert shape(made.run()) == [(0, 0, 40), (2, 0, 40), (3, 0, 40)]


def test_plan_of_parts_oldest_goes_on_while_shorter_prompts_never_stop_coming():
    made = Bench(batch_tokens=8, costs=COSTS, target_s=0.01, unified=False)
    made.submit(sequence(0, 100))
    for id in range(1, 60):
        made.submit(sequence(id, 6))
        for item in made.run().items:
            if item.sequence.id and item.sequence.num_completion:
                made.scheduler.end(item.sequence, Phase.FINISHED, keep=False)
        if made.scheduler.running[0].phase is Phase.DECODE:
            return
    raise AssertionError("the oldest does not come to its end")


@given(
    length=st.integers(1, 1000), batch_tokens=st.integers(ATTENTION_ROWS + 1, 300), is_beside=st.booleans()
)
def test_plan_of_parts_fills_the_tiles_of_a_lone_prompt_after_its_first_run(length, batch_tokens, is_beside):
    changes = {"batch_tokens": batch_tokens, "unified": False, "context": 2048}
    made = one_decoding(**changes) if is_beside else Bench(**changes)
    made.submit(sequence(1, length))
    runs: list[int] = []
    for _ in range(length + 2):
        runs += [item.count for item in made.run().items if item.sequence.id]
        if sum(runs) >= length:
            break
    assert sum(runs) == length
    assert not any(run % ATTENTION_ROWS for run in runs[1:])


@pytest.mark.parametrize("length", [ATTENTION_ROWS, ATTENTION_ROWS + 1, 5 * ATTENTION_ROWS])
@pytest.mark.parametrize("changes", [{"batch_tokens": 40}, {"target_s": 0.01}], ids=["batch", "target"])
def test_plan_of_parts_with_less_than_a_tile_at_once_reads_on(length, changes):
    made = one_decoding(unified=False, context=2048, **changes)
    long = sequence(1, length)
    made.submit(long)
    for _ in range(length):
        made.run()
        if long.phase is Phase.DECODE:
            return
    raise AssertionError("the prompt does not come to its end")


# ---- fairness ---------------------------------------------------------------------------------------


def test_plan_lets_short_prompts_pass_and_keeps_half_for_the_oldest():
    made = Bench()
    made.submit(sequence(0, 200), sequence(1, 30), sequence(2, 10))
    assert shape(made.run()) == [(0, 0, 88), (1, 0, 30), (2, 0, 10)]


def test_plan_gives_the_oldest_half_however_many_shorter_ones_there_are():
    made = Bench()
    made.submit(sequence(0, 250), sequence(1, 100), sequence(2, 90))
    assert shape(made.run()) == [(0, 0, 64), (2, 0, 64)]


def test_plan_oldest_goes_on_while_shorter_prompts_never_stop_coming():
    made = Bench(batch_tokens=8, costs=COSTS, target_s=0.01)
    made.submit(sequence(0, 100))
    for id in range(1, 60):
        made.submit(sequence(id, 6))
        for item in made.run().items:
            if item.sequence.id and item.sequence.num_completion:
                made.scheduler.end(item.sequence, Phase.FINISHED, keep=False)
        if made.scheduler.running[0].phase is Phase.DECODE:
            assert id <= 26
            return
    raise AssertionError("the oldest does not come to its end")


def test_plan_oldest_with_prompt_logprobs_goes_on_while_shorter_ones_never_stop_coming():
    """Rows with logits are shared as tokens are: the newcomers would take them all otherwise."""
    made = Bench(batch_tokens=64, max_outputs=SLOTS + 9)
    made.submit(sequence(0, 60, output=LOGPROBS))
    for id in range(1, 60):
        made.submit(sequence(id, 10, output=LOGPROBS))
        for item in made.run().items:
            if item.sequence.id and item.sequence.num_completion:
                made.scheduler.end(item.sequence, Phase.FINISHED, keep=False)
        if made.scheduler.running[0].phase is Phase.DECODE:
            assert id <= 15
            return
    raise AssertionError("the oldest does not come to its end")


@pytest.mark.parametrize("max_outputs", [SLOTS, SLOTS + 4])
def test_plan_with_prompt_logprobs_is_cut_to_the_rows_with_logits(max_outputs):
    made = Bench(max_outputs=max_outputs)
    made.submit(sequence(0, 20, output=LOGPROBS), sequence(1, 20), sequence(2, 30, output=LOGPROBS))
    plan = made.run()
    rows = {item.sequence.id: item.count for item in plan.items if item.sequence.id != 1}
    assert sum(rows.values()) + 1 <= max_outputs
    assert (1, 0, 20) in shape(plan)


# ---- followers --------------------------------------------------------------------------------------


def test_follower_waits_for_its_leader_and_then_computes_its_own_part():
    made = Bench(batch_tokens=64)
    made.submit(sequence(0, [1] * 100), sequence(1, [*[1] * 100, 2, 3]))
    plan = made.run()
    assert [each.id for each in plan.started] == [0]
    assert shape(plan) == [(0, 0, 64)]
    assert shape(made.run()) == [(0, 64, 36)]
    plan = made.run()
    assert [(each.id, each.num_cached) for each in plan.started] == [(1, 100)]
    assert shape(plan) == [(0, 100, 1), (1, 100, 2)]


@pytest.mark.parametrize(("shared", "waits"), [(FEWEST_AWAITED - 1, False), (FEWEST_AWAITED, True)])
def test_follower_waits_only_if_it_saves_enough(shared, waits):
    made = Bench()
    made.submit(sequence(0, [1] * shared), sequence(1, [*[1] * shared, 2, 3]))
    plan = made.run()
    assert [each.id for each in plan.started] == ([0] if waits else [0, 1])


@pytest.mark.parametrize("keep", [True, False])
def test_follower_of_a_leader_that_leaves_leads_those_behind_it(keep):
    made = Bench(batch_tokens=64)
    leader = sequence(0, [1] * 150)
    made.submit(leader, sequence(1, [*[1] * 150, 2]), sequence(2, [*[1] * 150, 3]))
    made.run()
    made.scheduler.end(leader, Phase.CANCELLED, keep=keep)
    had = 64 if keep else 0
    plan = made.run()
    assert [(each.id, each.num_cached) for each in plan.started] == [(1, had)]
    assert shape(plan) == [(1, had, 64)]
    assert made.scheduler.running[2].leader is made.scheduler.running[1]


def test_follower_of_a_follower_gets_the_longer_prefix():
    made = Bench(batch_tokens=128)
    made.submit(
        sequence(0, [1] * 50),
        sequence(1, [*[1] * 50, *[2] * 50]),
        sequence(2, [*[1] * 50, *[2] * 50, 3]),
    )
    plans = [made.run() for _ in range(3)]
    started = [[(each.id, each.num_cached) for each in plan.started] for plan in plans]
    assert started == [[(0, 0)], [(1, 50)], [(2, 100)]]


def test_chunk_of_a_state_that_cannot_be_cut_ends_where_a_follower_begins():
    made = Bench(can_cut=False)
    made.submit(sequence(0, [1] * 100), sequence(1, [*[1] * 40, 2]), sequence(2, [*[1] * 60, 2]))
    reads = [read for _ in range(9) for read in shape(made.run()) if read[1] < 100]
    assert [read for read in reads if read[0] == 0] == [(0, 0, 40), (0, 40, 20), (0, 60, 40)]
    assert (1, 40, 1) in reads
    assert (2, 60, 1) in reads


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_prefill_of_any_prompts_computes_each_token_once(lengths):
    made = Bench(batch_tokens=7)
    made.submit(*(sequence(id, [id] * length) for id, length in enumerate(lengths)))
    computed: dict[int, list[int]] = {id: [] for id in range(len(lengths))}
    for _ in range(sum(lengths) * 4):
        plan = made.scheduler.plan()
        for item in plan.items:
            computed[item.sequence.id] += range(item.start, item.start + item.count)
        made.compute(plan)
        for item in plan.items:
            if item.sequence.num_completion:
                made.scheduler.end(item.sequence, Phase.FINISHED, keep=True)
        if not made.scheduler.running and not made.scheduler.waiting:
            break
    assert computed == {id: list(range(length)) for id, length in enumerate(lengths)}
