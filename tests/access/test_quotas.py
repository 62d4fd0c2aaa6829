"""Quotas: what is admitted, what is charged, and when it is free again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.access import quotas as module
from bear_grpc.access.caller import Caller, Quotas
from bear_grpc.access.quotas import DAY_S, STREAM_RETRY_S, Admitted, Bucket, Limiter
from bear_grpc.errors import QuotaExceeded
from bear_grpc.testing.clock import FakeClock

NOON = 20_000 * DAY_S + DAY_S / 2


class World:
    """A limiter, with two clocks that go together, and one caller."""

    def __init__(self, **quotas: int) -> None:
        self.clock, self.wall = FakeClock(), FakeClock(NOON)
        self.limiter = Limiter(self.clock, self.wall)
        self.caller = Caller(id="one", tenant="one", quotas=Quotas(**quotas))

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.wall.advance(seconds)

    def admit(self, *, generates: bool = True) -> Admitted:
        return self.limiter.admit(self.caller, generates=generates)

    def refused(self, *, generates: bool = True) -> QuotaExceeded:
        with pytest.raises(QuotaExceeded) as caught:
            self.admit(generates=generates)
        return caught.value


def test_requests_of_a_minute_come_back_one_by_one() -> None:
    world = World(requests_per_minute=3)
    for generates in (True, False, True):
        world.admit(generates=generates)
    error = world.refused(generates=False)
    assert error.metadata == {"subject": "one", "quota": "requests_per_minute", "limit": "3"}
    assert error.retry_after_s == pytest.approx(20.0, abs=0.002)
    world.advance(19.99)
    world.refused()
    world.advance(error.retry_after_s - 19.99)
    world.admit()
    world.refused()


def test_debt_of_tokens_is_paid_off_before_the_next_generation() -> None:
    world = World(tokens_per_minute=60)
    first = world.admit()
    first.charge(50)
    second = world.admit()  # ten are left
    first.charge(100)
    assert first.charged == 150
    second.charge(0)
    error = world.refused()
    assert error.metadata["quota"] == "tokens_per_minute"
    assert error.retry_after_s == pytest.approx(91.0, abs=0.002)  # a debt of 90, and one token
    world.admit(generates=False)
    world.advance(error.retry_after_s)
    world.admit()


def test_what_was_charged_too_much_is_given_back() -> None:
    world = World(tokens_per_minute=10, tokens_per_day=10)
    admitted = world.admit()
    admitted.charge(12)
    world.refused()
    admitted.charge(-5)
    world.admit()


def test_streams_are_free_when_they_are_released_once() -> None:
    world = World(concurrent_streams=2)
    held = [world.admit(), world.admit()]
    error = world.refused()
    assert (error.metadata["quota"], error.metadata["limit"]) == ("concurrent_streams", "2")
    assert error.retry_after_s == pytest.approx(STREAM_RETRY_S, abs=0.002)
    world.admit(generates=False).release()
    held[0].release()
    held[0].release()
    world.admit()
    world.refused()


def test_day_ends_at_midnight_in_utc() -> None:
    world = World(tokens_per_day=100)
    world.admit().charge(99)
    running = world.admit()
    running.charge(1)
    error = world.refused()
    assert error.metadata["quota"] == "tokens_per_day"
    assert error.retry_after_s == pytest.approx(DAY_S / 2, abs=0.002)
    world.wall.advance(error.retry_after_s)
    running.charge(99)  # belongs to the day on which it is used
    world.admit().charge(1)
    world.refused()


def test_day_goes_on_after_a_restart() -> None:
    world = World(tokens_per_day=100)
    world.limiter.restore({"one": 60, "other": 1000})
    world.admit().charge(40)
    world.refused()


def test_clock_that_is_set_back_over_midnight_gives_no_day_twice() -> None:
    world = World(tokens_per_day=10)
    world.admit().charge(10)
    world.wall.advance(DAY_S)
    world.admit().charge(10)
    for away in (-DAY_S, DAY_S):
        world.wall.advance(away)
        world.refused()


def test_longest_wait_is_told_and_refusals_use_nothing() -> None:
    world = World(requests_per_minute=60, tokens_per_minute=60)
    world.admit().charge(65)
    for _ in range(100):
        assert world.refused().metadata["quota"] == "tokens_per_minute"
    for _ in range(59):
        world.admit(generates=False)
    assert world.refused(generates=False).metadata["quota"] == "requests_per_minute"


def test_callers_have_quotas_of_their_own_and_changed_ones_count() -> None:
    world = World(requests_per_minute=1)
    world.admit()
    other = Caller(id="other", quotas=Quotas(requests_per_minute=1))
    world.limiter.admit(other, generates=True)
    world.refused()
    world.caller = Caller(id="one", quotas=Quotas(concurrent_streams=1))
    assert world.refused().metadata["quota"] == "concurrent_streams"  # the first one runs on


@pytest.mark.parametrize(
    ("changed", "wait_s"),
    [
        ({"tokens_per_minute": 60, "concurrent_streams": 9}, 41),
        ({"tokens_per_minute": 120}, 20.5),
        ({"tokens_per_minute": 6}, 410),
    ],
)
def test_changed_quotas_forgive_no_debt(changed: dict[str, int], wait_s: float) -> None:
    world = World(tokens_per_minute=60)
    running = world.admit()
    running.charge(100)
    world.caller = Caller(id="one", quotas=Quotas(**changed))
    assert world.refused().retry_after_s == pytest.approx(wait_s, abs=0.002)
    running.charge(-41)
    world.admit()


def test_changed_quotas_do_not_fill_what_was_used() -> None:
    world = World(requests_per_minute=3)
    for _ in range(3):
        world.admit()
    for limit in (4, 3, 300):
        world.caller = Caller(id="one", quotas=Quotas(requests_per_minute=limit))
        assert world.refused().retry_after_s == pytest.approx(60 / limit, abs=0.002)
    world = World(requests_per_minute=300)
    world.admit()
    world.caller = Caller(id="one", quotas=Quotas(requests_per_minute=2))
    for _ in range(2):
        world.admit()
    world.refused()


def test_only_who_has_nothing_counted_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    limiter = Limiter(clock := FakeClock(), FakeClock(NOON))
    quotas = Quotas(requests_per_minute=1, concurrent_streams=1)
    limiter.admit(Caller(id="runs", quotas=quotas), generates=True)
    limiter.admit(Caller(id="ended", quotas=quotas), generates=True).release()
    clock.advance(60)
    limiter.admit(Caller(id="third", quotas=quotas), generates=True)
    assert set(limiter._accounts) == {"runs", "third"}
    with pytest.raises(QuotaExceeded):
        limiter.admit(Caller(id="runs", quotas=quotas), generates=True)


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 30)), max_size=20),
)
def test_no_window_admits_more_than_the_bucket_allows(limit: int, steps: list[tuple[float, int]]) -> None:
    """Whatever is asked and when: in any time `t` at most limit + limit * t / 60."""
    bucket, now_s, admitted = Bucket(limit, 0.0), 0.0, []
    for pause_s, asked in steps:
        now_s += pause_s
        for _ in range(asked):
            if bucket.wait_s(now_s) == 0:
                bucket.take(1, now_s)
                admitted.append(now_s)
    for first, begin in enumerate(admitted):
        for last in range(first, len(admitted)):
            allowed = limit + (admitted[last] - begin) * limit / 60
            assert last - first + 1 <= allowed + 1e-3


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.floats(0, 1e6))
def test_whoever_waits_as_told_is_admitted(limit: int, used: int, passed_s: float) -> None:
    world = World(tokens_per_minute=limit)
    world.advance(passed_s)
    world.admit().charge(limit + used)
    wait_s = world.refused().retry_after_s
    assert wait_s is not None
    world.advance(wait_s)
    world.admit()


@given(st.integers(1, 4), st.lists(st.integers(-1, 8), max_size=60))
def test_no_more_streams_than_may_run(limit: int, steps: list[int]) -> None:
    world, running = World(concurrent_streams=limit), []
    for step in steps:
        if step < 0 or not running:
            try:
                running.append(world.admit())
            except QuotaExceeded:
                assert len(running) == limit
            assert len(running) <= limit
        else:
            running.pop(step % len(running)).release()
