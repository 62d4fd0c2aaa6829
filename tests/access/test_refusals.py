"""Refused calls in the audit log: what one caller can make of lines is bounded, and none goes untold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bear_grpc.access import refusals as module
from bear_grpc.access.audit import Entry, append
from bear_grpc.access.refusals import ACTION, TOLD, WINDOW_S, Refusals
from bear_grpc.cli import app
from bear_grpc.testing.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def refusals(clock: FakeClock) -> Refusals:
    return Refusals(clock)


def refused(actor: str = "one") -> Entry:
    return Entry(
        "LoadModel",
        actor=actor,
        tenant=actor,
        peer="ipv4:10.0.0.1:5",
        subjects=("tiny",),
        code="PERMISSION_DENIED",
        reason="SCOPE_MISSING",
    )


def told(refusals: Refusals, count: int, actor: str = "one") -> int:
    return sum(refusals.is_told(refused(actor)) for _ in range(count))


def test_a_few_of_each_caller_are_told_and_the_others_counted(refusals: Refusals, clock: FakeClock) -> None:
    assert [told(refusals, 500), told(refusals, 3, "other")] == [TOLD, 3]
    clock.advance(WINDOW_S - 1)
    assert refusals.due() == [] and not refusals.is_empty
    clock.advance(1)
    [entry] = refusals.due()
    assert (entry.action, entry.actor, entry.count, entry.subjects) == (ACTION, "one", 500 - TOLD, ())
    assert (entry.code, entry.reason, entry.duration_s) == ("PERMISSION_DENIED", "SCOPE_MISSING", WINDOW_S)
    assert refusals.is_empty
    assert told(refusals, 500) == TOLD


def test_counted_ones_are_not_forgotten_if_nobody_asks_in_time(refusals: Refusals, clock: FakeClock) -> None:
    """The disk may hang for longer than a window."""
    told(refusals, TOLD + 5)
    clock.advance(3 * WINDOW_S)
    assert told(refusals, 5) == 0
    assert [entry.count for entry in refusals.due()] == [10]


def test_a_window_without_counted_ones_ends_by_itself(refusals: Refusals, clock: FakeClock) -> None:
    told(refusals, TOLD)
    clock.advance(WINDOW_S)
    assert told(refusals, 1) == 1


def test_all_that_was_counted_is_told_at_the_end(refusals: Refusals) -> None:
    assert refusals.is_told(refused(), has_room=False) is False
    told(refusals, TOLD + 2)
    assert [entry.count for entry in refusals.due(at_once=True)] == [3]
    assert refusals.is_empty


def test_callers_are_bounded_and_those_above_are_counted_together(
    refusals: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CALLERS", 2)
    assert [told(refusals, 1, actor) for actor in ("a", "b", "c", "d", "a")] == [1, 1, 0, 0, 1]
    [entry] = refusals.due(at_once=True)
    assert (entry.actor, entry.tenant, entry.peer, entry.count) == ("", "", "", 2)


def test_their_number_is_shown(tmp_path: Path, refusals: Refusals) -> None:
    told(refusals, TOLD + 7)
    for entry in refusals.due(at_once=True):
        append(tmp_path, entry)

    def bear(*args: str) -> str:
        environ = {"BEAR_STATE_DIR": str(tmp_path)}
        return CliRunner().invoke(app, ["audit", *args], env=environ, catch_exceptions=False).stdout

    assert "7 more" in bear()
    assert json.loads(bear("--json"))[0]["count"] == 7
