"""Tenants share slots and steps: what one of them asks for is no reason that another waits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.engine.cost import CostModel
from bear_grpc.params import Priority
from bear_grpc.protocol import Started
from bear_grpc.types import LoadOptions, StepCost
from tests.engine.harness import Harness, alone

# Steps of a CPU: those of few tokens wait for memory, those of many for arithmetic.
COSTS = [StepCost(1, 0.03), StepCost(2, 0.05), StepCost(16, 0.13), StepCost(64, 0.31), StepCost(512, 2.5)]
HEAVY, LIGHT = "heavy", "light"


class Company:
    """A harness whose steps take the time of a real machine."""

    def __init__(self, slots: int, **changes: object) -> None:
        costs = CostModel(COSTS)
        self.harness = Harness(
            max_sequences=slots,
            batch_tokens=512,
            context_length=1024,
            costs=costs,
            seconds_per_step=CostModel(COSTS).predict,
            **changes,
        )
        self.next_id = 1

    def ask(self, tenant: str, prompt: int, drawn: int, **changes: object) -> int:
        """A request of so many tokens, like no other."""
        id, self.next_id = self.next_id, self.next_id + 1
        self.harness.submit(id, [1 + id % 250] * prompt, max_tokens=drawn, tenant=tenant, **changes)
        return id

    def time_of(self, id: int) -> float:
        """Steps until it has ended; from when it came to then."""
        while not self.harness.endings(id):
            assert self.harness.step()
        return self.harness.clock() - self.harness.sequences[id].received_s


def time_beside(
    heavy: int, *, slots: int, prompt: int, drawn: int, after: int = 40, **changes: object
) -> float:
    """Seconds of a light tenant's request that comes `after` steps of another's `heavy` long ones."""
    company = Company(slots, **changes)
    for _ in range(heavy):
        company.ask(HEAVY, 120, 600)
    for _ in range(after):
        company.harness.step()
    return company.time_of(company.ask(LIGHT, prompt, drawn))


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "parts"])
@pytest.mark.parametrize(("prompt", "drawn"), [(16, 16), (8, 64), (200, 8), (16, 2)])
@pytest.mark.parametrize("slots", [2, 4, 16])
def test_short_request_beside_100_long_ones_takes_at_most_twice_what_it_takes_beside_one(
    slots, prompt, drawn, unified
):
    options = LoadOptions(kv_unified=unified)
    one, many = (
        time_beside(heavy, slots=slots, prompt=prompt, drawn=drawn, options=options) for heavy in (1, 100)
    )
    assert many <= 2 * one


@pytest.mark.parametrize("after", [1, 2, 5, 9, 20])
def test_it_takes_no_more_than_that_while_the_long_prompts_are_read(after):
    one, many = (time_beside(heavy, slots=16, prompt=16, drawn=16, after=after) for heavy in (1, 100))
    assert many <= 2 * one


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "parts"])
def test_heavy_tenant_goes_on_beside_a_stream_that_never_ends(unified):
    company = Company(8, options=LoadOptions(kv_unified=unified))
    long = [company.ask(HEAVY, 200, 40) for _ in range(16)]
    light = company.ask(LIGHT, 8, 900)
    for id in long:
        company.time_of(id)
    assert not company.harness.endings(light)


def drawn_of(harness: Harness, tenant: str) -> int:
    return sum(each.num_completion for each in harness.sequences.values() if each.tenant == tenant)


def test_two_tenants_with_as_much_to_do_are_served_alike():
    company = Company(4)
    for _ in range(30):
        company.ask("first", 40, 60)
    for _ in range(30):
        company.ask("second", 40, 60)
    while company.harness.clock() < 1060.0:
        company.harness.step()
    first, second = (drawn_of(company.harness, tenant) for tenant in ("first", "second"))
    assert min(first, second) >= 0.9 * max(first, second) > 0


def test_slot_goes_to_the_tenant_that_has_fewer():
    company = Company(2)
    for _ in range(4):
        company.ask(HEAVY, 8, 20)
    light = company.ask(LIGHT, 8, 4)
    company.harness.step()
    assert any(isinstance(event, Started) for event in company.harness.events(light))


def test_tenant_with_more_than_its_share_loses_its_youngest_and_its_text_does_not_change():
    harness = Harness(max_sequences=3)
    for id in (1, 2, 3):
        harness.submit(id, f"prompt {id}", max_tokens=20, tenant=HEAVY)
    for _ in range(10):
        harness.step()
    harness.submit(4, "hello", tenant=LIGHT)
    harness.run()
    preemptions = [harness.sequences[id].preemptions for id in (1, 2, 3, 4)]
    assert preemptions == [0, 0, 1, 0]
    for id in (1, 2, 3):
        assert harness.result(id) == alone(f"prompt {id}", max_tokens=20)
    assert harness.result(4) == alone("hello")
    assert harness.engine.stats().preemptions == 1
    assert harness.is_clean()


def test_what_a_preempted_one_had_is_not_computed_again():
    harness = Harness(max_sequences=2, batch_tokens=64)
    for id in (1, 2):
        harness.submit(id, f"{id} is the number of this prompt", max_tokens=30, tenant=HEAVY)
    for _ in range(8):
        harness.step()
    harness.submit(3, "hello", max_tokens=4, tenant=LIGHT)
    harness.run()
    assert harness.sequences[2].preemptions == 1
    positions = harness.computed[2]
    # The last of them is computed once more, for its logits.
    assert len(positions) - len(set(positions)) <= 1


def test_tenants_with_as_many_slots_take_none_from_each_other():
    company = Company(4)
    for tenant in ("first", "second") * 4:
        company.ask(tenant, 8, 30)
    company.harness.run()
    assert company.harness.engine.stats().preemptions == 0


def test_more_tenants_than_slots_are_served_in_turn_without_preemption():
    company = Company(2)
    ids = [company.ask(f"tenant {place}", 8, 10) for place in range(8)]
    company.harness.run()
    starts = [event.id for step in company.harness.steps for event in step.events if type(event) is Started]
    assert starts == ids
    assert company.harness.engine.stats().preemptions == 0


# ---- priorities and tags ----------------------------------------------------------------------------


def starts_of(harness: Harness) -> list[int]:
    harness.run()
    return [event.id for step in harness.steps for event in step.events if isinstance(event, Started)]


def one_slot(*waiting: dict[str, object]) -> Harness:
    """One request runs, the others wait: ids from 2 on."""
    harness = Harness(max_sequences=1)
    harness.submit(1, "the first one", max_tokens=4)
    harness.step()
    for id, request in enumerate(waiting, 2):
        harness.submit(id, f"prompt {id}", max_tokens=2, **request)
    return harness


def test_urgent_ones_come_first_and_equal_ones_in_order():
    harness = one_slot(
        {"priority": Priority.LOW},
        {"priority": Priority.NORMAL},
        {"priority": Priority.HIGH},
        {"priority": Priority.NORMAL},
        {"priority": Priority.HIGH},
    )
    assert starts_of(harness) == [1, 4, 6, 3, 5, 2]


def test_high_priority_gains_nothing_on_other_tenants():
    harness = one_slot(
        {"tenant": "polite"},
        {"tenant": "loud", "priority": Priority.HIGH},
        {"tenant": "loud", "priority": Priority.HIGH},
        {"tenant": "polite"},
    )
    assert starts_of(harness)[:3] == [1, 2, 3]


def test_low_priority_stands_behind_all_tenants():
    harness = one_slot(
        {"tenant": "batch", "priority": Priority.LOW},
        {"tenant": "other"},
        {"tenant": "other"},
    )
    assert starts_of(harness) == [1, 3, 4, 2]


def test_low_priority_takes_no_slot_from_another_tenant():
    company = Company(2)
    for _ in range(2):
        company.ask(HEAVY, 8, 40)
    company.harness.step()
    company.ask("batch", 8, 4, priority=Priority.LOW)
    for _ in range(20):
        company.harness.step()
    assert company.harness.engine.stats().preemptions == 0


def test_who_has_waited_long_becomes_more_urgent():
    harness = one_slot({"priority": Priority.LOW})
    harness.clock.advance(10.5)  # now as urgent as what comes, and older
    harness.submit(3, "later", max_tokens=2)
    harness.submit(4, "urgent", max_tokens=2, priority=Priority.HIGH)
    assert starts_of(harness) == [1, 4, 2, 3]


def test_low_priority_does_not_wait_for_ever():
    company = Company(1)
    company.ask("busy", 8, 30)
    low = company.ask("batch", 8, 4, priority=Priority.LOW)
    for _ in range(2000):
        if company.harness.endings(low):
            break
        if company.harness.engine.stats().waiting < 3:
            company.ask("busy", 8, 30)
        company.harness.step()
    assert company.harness.endings(low)


def test_tags_of_a_tenant_share_its_slots():
    harness = one_slot({"tag": "a"}, {"tag": "a"}, {"tag": "a"}, {"tag": "b"}, {"tag": "c"})
    order = starts_of(harness)
    assert order[0] == 1
    assert set(order[1:4]) == {2, 5, 6}
    assert order[4:] == [3, 4]


# ---- any company ------------------------------------------------------------------------------------

ASKS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["", "x"]),
        st.sampled_from(Priority),
        st.integers(1, 40),
        st.integers(1, 12),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60)
@given(ASKS, st.integers(1, 4), st.booleans())
def test_everybody_ends_once_with_what_they_get_alone(asks, slots, unified):
    harness = Harness(max_sequences=slots, options=LoadOptions(kv_unified=unified))
    for id, (tenant, tag, priority, prompt, drawn, steps) in enumerate(asks, 1):
        tokens = [id] + [7] * prompt
        harness.submit(id, tokens, max_tokens=drawn, tenant=tenant, tag=tag, priority=priority, scope=tenant)
        for _ in range(steps):
            harness.step()
    harness.run()
    for id, (_, _, _, prompt, drawn, _) in enumerate(asks, 1):
        assert harness.result(id) == alone([id] + [7] * prompt, max_tokens=drawn)
    assert harness.is_clean()


@settings(max_examples=40)
@given(
    heavy=st.integers(20, 60),
    slots=st.sampled_from([2, 3, 8]),
    prompts=st.lists(st.integers(4, 200), min_size=1, max_size=4),
    drawn=st.integers(2, 40),
)
def test_light_tenant_waits_for_a_step_and_no_request(heavy, slots, prompts, drawn):
    """Nothing of it waits for a slot while the other tenant holds more than its share."""
    company = Company(slots)
    for _ in range(heavy):
        company.ask(HEAVY, 60, 300)
    for _ in range(10):
        company.harness.step()
    for prompt in prompts:
        id = company.ask(LIGHT, prompt, drawn)
        company.harness.step()
        assert company.harness.sequences[id].admitted_s
        company.time_of(id)
