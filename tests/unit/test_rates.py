"""Rates over windows, by a clock of the test's."""

from __future__ import annotations

import pytest

from bear_grpc.executor.rates import TokenRates
from bear_grpc.rpc.call import Call
from bear_grpc.rpc.load import GenerationRate
from bear_grpc.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_rate_is_of_the_window_only(clock: FakeClock) -> None:
    rates = TokenRates(clock)
    for second in range(1, 21):
        clock.advance(1)
        rates.add(prefill_tokens=100, decode_tokens=10 * second)
    assert rates.read() == (0, 10)


def test_worker_that_has_just_begun_is_measured_by_the_second_at_least(clock: FakeClock) -> None:
    rates = TokenRates(clock)
    clock.advance(0.1)
    rates.add(prefill_tokens=50, decode_tokens=0)
    assert rates.read() == (50, 0)
    clock.advance(1.9)
    assert rates.read() == (25, 0)


def test_silence_lets_a_rate_fall_to_nothing(clock: FakeClock) -> None:
    rates = TokenRates(clock)
    clock.advance(10)
    rates.add(0, 100)
    assert rates.read() == (0, 20)
    clock.advance(4)
    assert rates.read() == (0, 20)
    clock.advance(1.5)
    assert rates.read() == (0, 0)


def test_new_worker_counts_from_nothing(clock: FakeClock) -> None:
    rates = TokenRates(clock)
    clock.advance(1)
    rates.add(0, 1000)
    rates.restart()
    clock.advance(2)
    rates.add(0, 30)
    assert rates.read() == (0, 15)


def test_what_is_kept_is_bounded_by_the_window(clock: FakeClock) -> None:
    rates = TokenRates(clock)
    for _ in range(1000):
        clock.advance(0.1)
        rates.add(0, 0)
    assert len(rates._seen) <= 52


def test_generations_are_counted_when_they_have_ended(clock: FakeClock) -> None:
    rate = GenerationRate(clock)
    clock.advance(30)
    served = Call("", operation="chat", started_s=1.0, code="OK")
    cancelled = Call("", operation="chat", started_s=1.0, code="CANCELLED")
    broken = Call("", operation="chat", started_s=1.0, code="INTERNAL", reason="BACKEND_ERROR")
    full = Call("", operation="chat", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL")
    theirs = Call("", operation="chat", code="INVALID_ARGUMENT", reason="INVALID_FIELD")
    other = Call("", code="OK")
    for call in (served, cancelled, broken, full, theirs, other):
        rate.begin(call)
        rate.end(call)
    assert rate.read() == (4 / 30, 2 / 30)
    clock.advance(29)
    assert rate.read() == (4 / 30, 2 / 30)
    clock.advance(1)
    assert rate.read() == (0, 0)


def test_server_that_has_just_begun_divides_by_its_own_time(clock: FakeClock) -> None:
    rate = GenerationRate(clock)
    clock.advance(2)
    rate.end(Call("", operation="chat", started_s=1.0, code="OK"))
    assert rate.read().ended == 0.5
