"""The queue before the slots: what it foresees is what happens; service is counted once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.engine.sequence import Sequence
from bear_grpc.engine.shares import DRAWN_COST, MAX_IDLE, PROMPT_COST, Shares
from bear_grpc.engine.stop import TextMachine
from bear_grpc.engine.waiting import WaitingQueue
from bear_grpc.params import Priority, SamplingParams, StopParams

AGING_S = 10.0


def sequence(
    id: int = 0,
    tenant: str = "",
    tag: str = "",
    priority: Priority = Priority.NORMAL,
    *,
    received_s: float = 0.0,
    prompt: int = 4,
    begun: bool = False,
) -> Sequence:
    made = Sequence(
        id=id,
        tokens=[1] * prompt,
        sampling=SamplingParams(),
        stop=StopParams(),
        max_tokens=8,
        text=TextMachine(),
        received_s=received_s,
        credit=8,
        tenant=tenant,
        tag=tag,
        priority=priority,
    )
    made.arrival = id
    made.is_started = begun
    return made


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from("xy"),
        st.sampled_from(Priority),
        st.integers(0, 25),
        st.booleans(),
    ),
    max_size=20,
)


def queue_of(requests: list[tuple[str, str, Priority, int, bool]]) -> tuple[Shares, WaitingQueue]:
    shares = Shares()
    queue = WaitingQueue(shares, AGING_S)
    for id, (tenant, tag, priority, received_s, begun) in enumerate(requests):
        each = sequence(id, tenant, tag, priority, received_s=received_s, begun=begun)
        shares.join(each)
        queue.add(each)
    return shares, queue


@given(REQUESTS)
def test_order_foresees_who_is_next_as_long_as_nobody_comes_or_leaves(requests):
    shares, queue = queue_of([(*each[:3], 0, each[4]) for each in requests])
    foreseen = queue.order(30.0)
    happened = []
    while (head := queue.head(30.0)) is not None:
        queue.remove(head)
        shares.start(head)
        happened.append(head)
    assert [each.id for each in foreseen] == [each.id for each in happened]
    assert not queue and not [*queue]


@given(REQUESTS)
def test_order_has_everybody_and_its_first_is_the_head(requests):
    _, queue = queue_of(requests)
    order = queue.order(25.0)
    assert sorted(each.id for each in order) == [*range(len(requests))]
    assert queue.head(25.0) is (order[0] if order else None)


def test_head_of_an_empty_queue_is_nobody():
    assert queue_of([])[1].head(0.0) is None


def test_who_has_run_before_is_the_first_of_its_tenant():
    _, queue = queue_of([("a", "x", Priority.HIGH, 0, False), ("a", "x", Priority.LOW, 0, True)])
    assert [each.id for each in queue.order(0.0)] == [1, 0]


def test_tokens_are_charged_once_even_if_they_are_read_again():
    shares = Shares()
    each = sequence(prompt=5)
    shares.join(each)
    each.num_computed = 3
    shares.charge(each)
    assert shares.tenant(each).served == shares.tag(each).served == 3 * PROMPT_COST
    each.num_computed = 0  # preempted
    shares.charge(each)
    each.num_computed = 5
    shares.charge(each)
    each.tokens += [1, 1]
    each.num_computed = 7
    shares.charge(each)
    shares.charge(each)
    assert shares.tenant(each).served == 5 * PROMPT_COST + 2 * DRAWN_COST


def served(shares: Shares, each: Sequence, tokens: int) -> None:
    each.tokens += [1] * tokens
    each.num_computed = len(each.tokens)
    shares.charge(each)


def test_new_tenant_begins_where_the_one_served_least_is():
    shares = Shares()
    first, second, third = (sequence(id, tenant) for id, tenant in enumerate("abc"))
    shares.join(first)
    served(shares, first, 100)
    shares.join(second)
    assert shares.tenant(second).served == shares.tenant(first).served > 0
    served(shares, first, 50)
    shares.join(third)
    assert shares.tenant(third).served == shares.tenant(second).served < shares.tenant(first).served


def test_leaving_for_a_moment_does_not_wipe_out_what_has_been_served():
    shares = Shares()
    greedy, other = sequence(0, "greedy"), sequence(1, "other")
    shares.join(greedy)
    shares.join(other)
    served(shares, greedy, 100)
    before = shares.tenant(greedy).served
    shares.leave(greedy)
    again = sequence(2, "greedy")
    shares.join(again)
    assert shares.tenant(again).served == before


def test_idle_ones_are_remembered_up_to_a_number_and_of_them_those_served_most():
    shares = Shares()
    patient = sequence(0, "patient")
    shares.join(patient)
    for id in range(1, 3 * MAX_IDLE):
        each = sequence(id, f"tenant {id}")
        shares.join(each)
        served(shares, each, id)
        shares.leave(each)
    assert len(shares._tenants) == MAX_IDLE + 1
    again = sequence(3 * MAX_IDLE, f"tenant {3 * MAX_IDLE - 1}")
    shares.join(again)
    assert shares.tenant(again).served > shares.tenant(patient).served


def test_idle_tenants_are_forgotten_once_the_others_have_been_served_as_much():
    shares = Shares()
    steady = sequence(0, "steady")
    shares.join(steady)
    for id in range(1, 100):
        each = sequence(id, f"tenant {id}")
        shares.join(each)
        served(shares, steady, 10)
        shares.leave(each)
    assert len(shares._tenants) == 1
    shares.leave(steady)
    assert not shares._tenants and shares.alive == 0
