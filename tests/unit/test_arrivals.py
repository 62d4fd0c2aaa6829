"""Calls that wait for their model: bounded for each, and gone without a trace."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from bear_grpc.errors import QueueFull
from bear_grpc.models.arrivals import Arrivals


def test_as_many_calls_wait_for_a_model_as_may_and_others_have_their_own():
    arrivals = Arrivals(2)
    with ExitStack() as stack:
        for name in ("a", "a", "b"):
            stack.enter_context(arrivals.wait(name))
        with pytest.raises(QueueFull) as caught, arrivals.wait("a"):
            pass
        assert (caught.value.metadata["model"], caught.value.metadata["waiting"]) == ("a", "2")
        with arrivals.wait("b"):
            pass
    for _ in range(3):
        with arrivals.wait("a"):
            pass


def test_what_the_executor_has_already_is_ahead_and_counts():
    arrivals = Arrivals(3)
    with arrivals.wait("a", 2), pytest.raises(QueueFull), arrivals.wait("a", 2):
        pass


def test_those_refused_at_once_are_told_different_times():
    arrivals, told = Arrivals(1), []
    with arrivals.wait("a"):
        for _ in range(3):
            with pytest.raises(QueueFull) as caught, arrivals.wait("a"):
                pass
            told.append(caught.value.retry_after_s)
    assert told == sorted(set(told))


def test_a_call_that_fails_leaves_its_place():
    arrivals = Arrivals(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), arrivals.wait("a"):
            raise ZeroDivisionError
