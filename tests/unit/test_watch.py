"""When a worker counts as stuck, and what is told of its death."""

from __future__ import annotations

import os

import pytest

from bear_grpc.executor.crash import MAX_LINE, NATIVE_MARK, REPORTED_LINES, CrashReport
from bear_grpc.executor.watch import CHECK_S, Watch
from bear_grpc.protocol import Heartbeat
from bear_grpc.suspects import MAX_IDS, PAGE_BYTES, Suspects, SuspectsPage, create
from bear_grpc.testing import FakeClock


class World:
    def __init__(self, startup_timeout_s: float = 0.0) -> None:
        self.clock = FakeClock()
        self.watch = Watch(self.clock, 10.0, startup_timeout_s)
        self._began: dict[int, float] = {}

    def run_step(self, step: int, seconds: float, predicted_s: float = 0.0) -> str | None:
        """The worker computes the same step for so long, by the clock that it shares with the server."""
        began_s = self._began.setdefault(step, self.clock())
        for _ in range(round(seconds / CHECK_S)):
            self.clock.advance(CHECK_S)
            self.watch.beat(Heartbeat(step, self.clock() - began_s, predicted_s))
            found = self.watch.overdue()
            if found is not None:
                return found
        return None

    def pass_time(self, seconds: float, beat: Heartbeat | None = None) -> str | None:
        """Checks as often as a server does; the first finding."""
        for _ in range(round(seconds / CHECK_S)):
            self.clock.advance(CHECK_S)
            if beat is not None:
                self.watch.beat(beat)
            found = self.watch.overdue()
            if found is not None:
                return found
        return None


def test_a_worker_that_gives_signs_of_life_is_well():
    assert World().pass_time(1000.0, Heartbeat(1, 0.0)) is None


def test_a_worker_that_gives_none_is_stuck_after_the_time():
    world = World()
    world.watch.beat(Heartbeat(1, 0.0))
    assert world.pass_time(10.0) is None
    assert "no sign of life for 10.2 s" in world.pass_time(1.0)


@pytest.mark.parametrize(("predicted_s", "limit_s"), [(0.0, 10.0), (0.5, 10.0), (3.0, 30.0)])
def test_a_step_is_stuck_after_ten_times_its_prediction_and_ten_seconds_at_least(predicted_s, limit_s):
    world = World()
    assert world.run_step(4, limit_s, predicted_s) is None
    assert "step 4 has run" in world.run_step(4, 2 * CHECK_S, predicted_s)


def test_steps_that_follow_each_other_are_well():
    world = World()
    for step in range(10):
        assert world.run_step(step, 9.0) is None


def test_a_worker_that_starts_may_be_silent_for_longer():
    world = World(startup_timeout_s=60.0)
    assert world.pass_time(60.0) is None
    assert world.pass_time(1.0) is not None
    world = World(startup_timeout_s=60.0)
    assert world.pass_time(30.0) is None
    world.watch.has_started()
    assert "no sign of life" in world.pass_time(CHECK_S)


HOURS_S = 5 * 3600.0


@pytest.mark.parametrize("jump_s", [HOURS_S, -HOURS_S], ids=["forwards", "backwards"])
def test_a_clock_that_jumps_makes_nobody_stuck_and_hides_nobody_who_is(jump_s):
    world = World()
    assert world.run_step(1, 9.0) is None
    world.clock.advance(jump_s)
    assert world.run_step(2, 9.0) is None
    world.clock.advance(jump_s)
    assert world.pass_time(10.0) is None
    assert "no sign of life for 10.2 s" in world.pass_time(1.0)


def test_a_step_under_way_while_its_machine_is_suspended_is_not_stuck_for_it():
    """The worker sees the same jump of the clock."""
    world = World()
    assert world.run_step(1, 5.0) is None
    world.clock.advance(HOURS_S)
    assert world.run_step(1, 4.0) is None
    assert "step 1 has run" in world.run_step(1, 8.0)


def test_a_server_that_stood_still_itself_reads_what_has_come_first():
    world = World()
    world.clock.advance(100.0)
    assert world.watch.overdue() is None
    assert world.pass_time(10.0) is None
    assert world.pass_time(1.0) is not None


def test_the_page_tells_what_was_under_way():
    fd = create()
    theirs, ours = SuspectsPage(fd), SuspectsPage(fd)
    os.close(fd)
    assert ours.read() == Suspects()
    theirs.mark_step([7, 8])
    theirs.mark_text(9)
    assert ours.read() == Suspects((7, 8), 9)
    theirs.mark_step([])
    assert ours.read() == Suspects((), 9)
    theirs.mark_step(range(2 * MAX_IDS))
    theirs.mark_text(0)
    assert ours.read() == Suspects(tuple(range(MAX_IDS)), 0)
    theirs.close()
    ours.close()


def test_a_page_with_nonsense_is_read_within_its_bounds():
    fd = create()
    page = SuspectsPage(fd)
    os.pwrite(fd, b"\xff" * PAGE_BYTES, 0)
    os.close(fd)
    assert len(page.read().sequences) == MAX_IDS
    page.close()


def test_a_report_tells_native_words_suspects_and_the_last_lines():
    lines = ("first", NATIVE_MARK + "GGML_ASSERT(x) failed", *("y" * 1000 for _ in range(10)))
    told = CrashReport("SIGABRT", lines=lines, suspects=Suspects((3, 4), 5)).describe()
    assert told.startswith("the worker ended: SIGABRT\nnative code said: GGML_ASSERT(x) failed\n")
    assert "step: 3, 4" in told
    assert "text job: 5" in told
    assert "first" not in told
    assert len(told) < (REPORTED_LINES + 1) * (MAX_LINE + 10)
    assert CrashReport("SIGKILL", stuck="why").describe() == "the worker ended: stuck: why"


def test_a_report_shows_the_stack_that_has_failed():
    stacks = ("Thread 1:", "  before", "Current thread 2:", *(f"  File {n}" for n in range(30)))
    told = CrashReport("SIGABRT", lines=stacks).describe()
    assert "before" not in told
    assert "it wrote:\n  Current thread 2:\n    File 0" in told
    assert "File 29" not in told
