"""The scheduler: slots, budgets and order hold in every history of submits, steps and ends."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from bear_grpc.engine.scheduler import Plan, Scheduler
from bear_grpc.engine.sequence import MOVES, Phase, Sequence
from bear_grpc.engine.stop import TextMachine
from bear_grpc.types import SamplingParams, StopParams

TERMINAL = [Phase.FINISHED, Phase.CANCELLED, Phase.FAILED]
SLOTS, BATCH, PREFILL = 3, 8, 5


def sequence(id: int, num_prompt: int = 4, *, credit: int = 100) -> Sequence:
    return Sequence(
        id=id,
        tokens=list(range(num_prompt)),
        sampling=SamplingParams(),
        stop=StopParams(),
        max_tokens=100,
        text=TextMachine(),
        received_s=0.0,
        credit=credit,
    )


def scheduler(**changes: int) -> Scheduler:
    return Scheduler(**{"max_sequences": SLOTS, "batch_tokens": BATCH, "prefill_tokens": PREFILL, **changes})


def run(made: Scheduler) -> Plan:
    """One step, in which every sequence that has logits draws a token."""
    plan = made.plan()
    finished = [item.sequence for item in plan.items if item.wants_logits]
    made.commit(plan)
    for each in finished:
        each.tokens.append(0)
    return plan


def shape(plan: Plan) -> list[tuple[int, int, int]]:
    return [(item.sequence.id, item.start, item.count) for item in plan.items]


class Histories(RuleBasedStateMachine):
    """Any order of submits, steps, credit and ends."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler()
        self.ids = itertools.count()
        self.submitted: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.ended: set[int] = set()

    @rule(target=live, num_prompt=st.integers(1, 14))
    def submit(self, num_prompt: int) -> Sequence:
        made = sequence(next(self.ids), num_prompt)
        self.submitted.append(made)
        self.scheduler.submit(made)
        return made

    @rule(which=consumes(live), phase=st.sampled_from([Phase.CANCELLED, Phase.FAILED]))
    def end(self, which: Sequence, phase: Phase) -> None:
        had_slot = which.phase is not Phase.WAITING
        freed = self.scheduler.end(which, phase)
        assert (freed is not None) == had_slot
        self.ended.add(which.id)

    @rule(which=live, credit=st.integers(0, 1))
    def set_credit(self, which: Sequence, credit: int) -> None:
        which.credit = credit

    @rule()
    def step(self) -> None:
        plan = self.scheduler.plan()
        self.admitted += plan.admitted
        decode = [item for item in plan.items if item.sequence.phase is Phase.DECODE]
        prefill = [item for item in plan.items if item.sequence.phase is Phase.PREFILL]
        assert sum(item.count for item in plan.items) <= BATCH
        assert sum(item.count for item in prefill) <= PREFILL
        assert [*plan.items] == decode + prefill
        assert len({item.sequence.id for item in plan.items}) == len(plan.items)
        for item in plan.items:
            assert item.count >= 1
            assert item.start == item.sequence.num_computed
            assert item.start + item.count <= len(item.sequence.tokens)
        ready = {s.id for s in self.scheduler.running.values() if s.phase is Phase.DECODE and s.credit > 0}
        assert {item.sequence.id for item in decode} == ready
        waiting = [s for s in self.scheduler.running.values() if s.phase is Phase.PREFILL]
        assert not waiting or prefill
        drawn = [item.sequence for item in plan.items if item.wants_logits]
        self.scheduler.commit(plan)
        for each in drawn:
            assert each.phase is Phase.DECODE
            each.tokens.append(0)

    @invariant()
    def no_slot_is_held_twice(self) -> None:
        held = [each.sequence_id for each in self.scheduler.running.values()]
        assert len(set(held)) == len(held) <= SLOTS
        assert all(0 <= id < SLOTS for id in held)

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        places = [each.id for each in self.scheduler.sequences()]
        assert sorted(places) == [each.id for each in self.submitted if each.id not in self.ended]
        assert all(each.phase is Phase.WAITING for each in self.scheduler.waiting)

    @invariant()
    def admission_is_first_come_first_served(self) -> None:
        ids = [each.id for each in self.admitted]
        assert ids == sorted(ids)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=30, stateful_step_count=30)


@pytest.mark.slow
class TestManyHistories(Histories.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=60)


def test_plan_without_sequences_is_empty():
    assert scheduler().plan() == Plan((), ())


def test_plan_gives_free_slots_to_the_head_of_the_queue():
    made = scheduler()
    for id in range(5):
        made.submit(sequence(id))
    assert [each.id for each in made.plan().admitted] == [0, 1, 2]
    assert [each.id for each in made.waiting] == [3, 4]


def test_plan_fills_the_prefill_budget_in_order_of_admission():
    made = scheduler()
    for id in range(3):
        made.submit(sequence(id, 4))
    assert shape(made.plan()) == [(0, 0, 4), (1, 0, 1)]


def test_plan_decodes_before_it_prefills():
    made = scheduler()
    made.submit(sequence(0, 2))
    run(made)
    made.submit(sequence(1, 9))
    assert shape(run(made)) == [(0, 2, 1), (1, 0, 5)]
    assert shape(run(made)) == [(0, 3, 1), (1, 5, 4)]


def test_plan_decode_tokens_shrink_the_prefill_when_the_batch_is_full():
    made = scheduler(batch_tokens=3, prefill_tokens=3)
    for id in range(2):
        made.submit(sequence(id, 1))
    run(made)
    made.submit(sequence(2, 9))
    assert shape(run(made)) == [(0, 1, 1), (1, 1, 1), (2, 0, 1)]


def test_plan_full_of_decode_tokens_prefills_nothing():
    made = scheduler(max_sequences=2, batch_tokens=1, prefill_tokens=1)
    made.submit(sequence(0, 1))
    run(made)
    made.submit(sequence(1, 1))
    assert shape(run(made)) == [(0, 1, 1)]


def test_plan_leaves_out_a_sequence_without_credit_and_keeps_its_slot():
    made = scheduler()
    made.submit(sequence(0, 1, credit=0))
    run(made)
    assert shape(made.plan()) == []
    assert [*made.running] == [0]


def test_plan_wants_logits_of_the_last_chunk_only():
    made = scheduler()
    made.submit(sequence(0, 7))
    first = made.plan()
    assert [item.wants_logits for item in first.items] == [False]
    made.commit(first)
    assert [item.wants_logits for item in made.plan().items] == [True]


def test_end_of_a_running_sequence_gives_its_slot_to_the_next():
    made = scheduler(max_sequences=1)
    first, second = sequence(0), sequence(1)
    made.submit(first)
    made.submit(second)
    made.plan()
    freed = made.end(first, Phase.CANCELLED)
    made.plan()
    assert second.sequence_id == freed


def test_end_of_a_waiting_sequence_frees_no_slot():
    made = scheduler()
    waiting = sequence(0)
    made.submit(waiting)
    assert made.end(waiting, Phase.CANCELLED) is None
    assert made.plan() == Plan((), ())


@pytest.mark.parametrize("phase", TERMINAL)
@pytest.mark.parametrize("again", TERMINAL)
def test_end_twice_is_an_error(phase, again):
    made = scheduler()
    ended = sequence(0, 2)
    made.submit(ended)
    run(made)
    made.end(ended, phase)
    with pytest.raises(RuntimeError, match="sequence 0"):
        made.end(ended, again)


def test_end_of_a_waiting_sequence_as_finished_is_an_error_that_changes_nothing():
    made = scheduler()
    waiting = sequence(0)
    made.submit(waiting)
    with pytest.raises(RuntimeError, match="WAITING -> FINISHED"):
        made.end(waiting, Phase.FINISHED)
    assert [*made.waiting] == [waiting]
    assert waiting.phase is Phase.WAITING


def test_moves_terminal_phases_have_no_exit_and_all_others_can_be_cancelled_and_fail():
    assert {phase for phase, exits in MOVES.items() if not exits} == {*TERMINAL}
    assert all({Phase.CANCELLED, Phase.FAILED} <= exits for exits in MOVES.values() if exits)
    assert {*MOVES} == {*Phase}


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_prefill_of_any_prompts_computes_each_token_once(lengths):
    made = scheduler()
    for id, length in enumerate(lengths):
        made.submit(sequence(id, length))
    computed: dict[int, list[int]] = {id: [] for id in range(len(lengths))}
    for _ in range(sum(lengths) * 4):
        plan = made.plan()
        for item in plan.items:
            computed[item.sequence.id] += range(item.start, item.start + item.count)
        made.commit(plan)
        for item in plan.items:
            if item.sequence.num_left == 0:
                made.end(item.sequence, Phase.FINISHED)
        if not made.running and not made.waiting:
            break
    assert computed == {id: list(range(length)) for id, length in enumerate(lengths)}
