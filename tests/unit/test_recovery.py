"""What becomes of requests when workers die: who goes on, who runs alone, who ends, and how."""

from __future__ import annotations

import pytest

from bear_grpc.errors import RequestQuarantined, WorkerCrashed
from bear_grpc.executor.crash import NATIVE_FAULTS, CrashReport
from bear_grpc.executor.generation import Generation
from bear_grpc.executor.recovery import Recovery
from bear_grpc.params import PromptInput, SamplingParams, StopParams
from bear_grpc.protocol import INITIAL_CREDIT_TOKENS, Delta, Finished, Started, Submit
from bear_grpc.suspects import Suspects
from bear_grpc.types import FinishReason, Timings, Usage


class World:
    """A live worker's requests; `sent` has the ids of the frames it was given since the last death."""

    def __init__(self, max_restarts: int = 3) -> None:
        self.recovery = Recovery("m", max_restarts)
        self.sent: list[Submit] = list(self.recovery.open())
        self.ends: dict[int, Exception] = {}

    def add(self, id: int, n: int = 1, **options: bool) -> Generation:
        generation = Generation(range(id, id + n), 0.0, lambda frame: None)
        submit = Submit(id, PromptInput("x"), SamplingParams(seed=4), StopParams(), 0.0, n=n)
        options = {"fail_on_restart": False, **options}
        self.sent += self.recovery.add(generation, submit, **options)
        return generation

    def start(self, *generations: Generation) -> None:
        for generation in generations:
            generation.push(Started(generation.ids.start, 1, 0, 9))

    def die(self, how: str, *ids: int, text_job: int = 0) -> None:
        ends = self.recovery.close(CrashReport(how, suspects=Suspects(ids, text_job)))
        for generation, error in ends:
            self.ends[generation.ids.start] = error
            self.recovery.remove(generation)
        self.sent = list(self.recovery.open())

    def finish(self, generation: Generation) -> None:
        self.sent += self.recovery.remove(generation)

    @property
    def ids(self) -> list[int]:
        return [frame.id for frame in self.sent]


def test_all_are_sent_again_in_their_order():
    world = World()
    first, _ = world.add(1), world.add(2)
    world.start(first)
    world.die("SIGKILL", 1)
    assert (world.ids, world.ends) == ([1, 2], {})


def test_only_what_a_worker_had_is_taken_by_the_next_one_whatever_waits():
    world = World()
    world.add(1)
    world.recovery.close(CrashReport("SIGKILL"))
    world.add(2)
    world.recovery.close(CrashReport("SIGKILL"))
    assert [(frame.id, frame.was_taken) for frame in world.recovery.open()] == [(1, True), (2, False)]


def test_what_comes_while_there_is_no_worker_waits_for_it():
    world = World()
    world.recovery.close(CrashReport("SIGKILL"))
    world.add(1)
    assert world.ids == []
    assert [frame.id for frame in world.recovery.open()] == [1]


def test_a_request_that_was_cut_off_goes_on_where_it_stands():
    world = World()
    generation = world.add(5, n=3)
    world.start(generation)
    generation.push(Delta(5, "ab", 1, ids=[300]))
    generation.push(Finished(6, FinishReason.LENGTH, None, Usage(1, 0, 1), Timings(0, 0, 0, 0)))
    world.die("SIGKILL", 5)
    running, waiting = world.sent
    assert (running.id, running.index, running.n, running.credit) == (5, 0, 1, INITIAL_CREDIT_TOKENS - 1)
    assert (running.resume.tokens, running.resume.text_length) == ((300).to_bytes(4, "little"), 2)
    assert (waiting.id, waiting.index, waiting.n, waiting.resume) == (7, 2, 1, None)


def test_only_who_was_under_way_counts_its_restarts():
    world = World(max_restarts=2)
    generation = world.add(1)
    world.add(2)
    world.start(generation)
    for _ in range(2):
        world.die("SIGKILL", 1)
    assert world.ends == {}
    world.die("SIGKILL", 1)
    assert list(world.ends) == [1]
    assert isinstance(world.ends[1], WorkerCrashed)
    assert world.ids == [2]


def test_who_may_not_go_on_ends_at_once():
    world = World()
    world.add(1, fail_on_restart=True)
    world.add(2)
    world.die("SIGKILL")
    assert isinstance(world.ends[1], WorkerCrashed)
    assert world.ids == [2]


@pytest.mark.parametrize("fault", sorted(NATIVE_FAULTS))
def test_suspects_run_alone_and_the_one_that_dies_alone_is_refused(fault):
    world = World()
    world.start(*[world.add(id) for id in (1, 2, 3)])
    world.die(fault, 1, 2)
    assert world.ids == [1, 2, 3]
    world.die(fault, 1, 2)
    assert world.ids == [1]
    world.add(4)
    assert world.ids == [1]
    world.die(fault, 1)
    assert list(world.ends) == [1]
    assert isinstance(world.ends[1], RequestQuarantined)
    assert world.ids == [2]


def test_a_suspect_that_ends_well_makes_room_for_the_others():
    world = World()
    suspects = [world.add(id) for id in (1, 2)]
    world.add(3)
    for _ in range(2):
        world.die("SIGSEGV", 1, 2)
    assert world.ids == [1]
    world.finish(suspects[0])
    assert world.ids == [1, 2]
    world.finish(suspects[1])
    assert world.ids == [1, 2, 3]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "exit code 70", "exit code 1"])
def test_other_ends_make_nobody_a_suspect(how):
    world = World(max_restarts=9)
    world.start(world.add(1), world.add(2))
    for _ in range(5):
        world.die(how, 1, 2)
        assert (world.ids, world.ends) == ([1, 2], {})


def test_a_worker_that_was_ended_as_stuck_makes_nobody_a_suspect():
    report = CrashReport("SIGABRT", stuck="no sign of life")
    assert not report.is_native_fault
    assert CrashReport("SIGABRT").is_native_fault


def test_a_request_whose_text_stops_the_worker_ends_with_it():
    world = World()
    world.add(1)
    world.add(2)
    world.die("exit code 75", text_job=1)
    assert isinstance(world.ends[1], WorkerCrashed)
    assert world.ids == [2]


def test_a_request_whose_text_ends_workers_is_a_suspect():
    world = World()
    world.add(1)
    world.add(2)
    for _ in range(2):
        world.die("SIGSEGV", text_job=1)
    assert world.ids == [1]
    world.die("SIGSEGV", text_job=1)
    assert isinstance(world.ends[1], RequestQuarantined)
    assert world.ids == [2]
