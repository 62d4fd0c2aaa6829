"""The worker's three threads together, on the fake backend: frames in, frames out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from bear_grpc.errors import ModelFileInvalid
from bear_grpc.framing import FrameBuffer, encode
from bear_grpc.params import OutputParams, PromptInput, SamplingParams, StopParams
from bear_grpc.protocol import (
    Cancel,
    Costs,
    Credit,
    Delta,
    Ended,
    Failed,
    Finished,
    Frame,
    Heartbeat,
    Load,
    Progress,
    Ready,
    SequenceEvent,
    Share,
    Started,
    Step,
    Stop,
    Submit,
    TextJob,
    TextResult,
)
from bear_grpc.testing import FakeBackend
from bear_grpc.types import CostTable, FinishReason, LoadOptions, LoadStage, StepCost
from bear_grpc.worker.process import Worker
from tests.engine.harness import GREEDY, alone

WAIT_S = 20
OPTIONS = LoadOptions(context_length=256, max_sequences=2, batch_tokens=32, threads=1, repack=False)
KNOWN = [CostTable(repack=False, threads=1, costs=[StepCost(1, 0.001)])]
LONG = 200
TOKENS = OutputParams(tokens=True)


class Bench:
    """A worker that runs in this process, and the server's end of its socket."""

    def __init__(self, prepare: Callable[[FakeBackend], None]) -> None:
        self.peer, theirs = socket.socketpair()
        self.peer.settimeout(WAIT_S)
        self.theirs = theirs
        self.backend: FakeBackend | None = None
        self._prepare = prepare
        self._buffer = FrameBuffer(to_worker=False)
        self._frames: list[Frame] = []
        self._events: list[SequenceEvent] = []
        self._thread = threading.Thread(target=Worker(theirs, self._make).run, daemon=True)
        self._thread.start()

    def _make(self, load: Load, post: Callable[[Frame], None]) -> FakeBackend:
        """Owner thread."""
        self.backend = FakeBackend(load.options)
        self._prepare(self.backend)
        return self.backend

    def send(self, *frames: Frame) -> None:
        self.peer.sendall(b"".join(map(encode, frames)))

    def next(self, kind: type[Frame]) -> Frame:
        """The next frame of a kind; heartbeats come when they come."""
        while True:
            while not self._frames:
                data = self.peer.recv(65536)
                assert data, "the worker has closed"
                self._frames += self._buffer.feed(data)
            frame = self._frames.pop(0)
            if isinstance(frame, kind):
                return frame
            assert isinstance(frame, Heartbeat | Progress | Costs), frame

    def load(self, options: LoadOptions = OPTIONS) -> Ready:
        self.send(Load("bear", "bear.gguf", options, cores=4, cost_tables=KNOWN))
        return self.next(Ready)

    def event(self, id: int, kind: type[SequenceEvent]) -> SequenceEvent:
        """The next event of a sequence that is of a kind; others of it are dropped."""
        while True:
            for place, event in enumerate(self._events):
                if event.id == id:
                    del self._events[place]
                    if isinstance(event, kind):
                        return event
                    break
            else:
                self._events += self.next(Step).events

    def join(self) -> bool:
        self._thread.join(WAIT_S)
        return not self._thread.is_alive()


def bench_of(prepare: Callable[[FakeBackend], None] = lambda backend: None) -> Iterator[Bench]:
    made = Bench(prepare)
    yield made
    if made.backend is not None:
        made.backend.release()
    made.peer.close()
    assert made.join()
    made.theirs.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield from bench_of()


@pytest.fixture
def held() -> Iterator[Bench]:
    """Its first forward blocks."""
    yield from bench_of(lambda backend: backend.hold())


def submit(id: int, *, max_tokens: int, credit: int = 1000) -> Submit:
    stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
    return Submit(
        id, PromptInput("hello", add_special=False), GREEDY, stop, 0.0, output=TOKENS, credit=credit
    )


def test_worker_loads_and_tells_what_it_has(bench):
    bench.send(Load("bear", "bear.gguf", OPTIONS, cores=4, cost_tables=KNOWN))
    assert bench.next(Progress) == Progress(LoadStage.STARTING)
    ready = bench.next(Ready)
    assert (ready.options.context_length, ready.options.max_sequences) == (256, 2)


def test_worker_whose_load_fails_says_why_and_ends():
    def fail(backend: FakeBackend) -> None:
        raise ModelFileInvalid("bear.gguf", "cut short")

    for bench in bench_of(fail):
        bench.send(Load("bear", "bear.gguf", OPTIONS, cores=4, cost_tables=KNOWN))
        assert bench.next(Failed).error.reason == "MODEL_FILE_INVALID"
        assert bench.join()


def test_worker_generates_what_the_engine_gives_alone(bench):
    bench.load()
    bench.send(submit(1, max_tokens=5))
    ids: list[int] = []
    while len(ids) < 5:
        ids += [token.id for token in bench.event(1, Delta).tokens]
    finished = bench.event(1, Finished)
    expected = alone(
        "hello",
        max_tokens=5,
        sampling=SamplingParams(
            temperature=0,
            repetition_penalty=1,
            logit_bias=tuple((token, -float("inf")) for token in bench.backend.vocabulary.eog_tokens()),
        ),
    )
    assert tuple(ids) == expected.ids
    assert (finished.reason, finished.usage.completion_tokens) == (FinishReason.LENGTH, 5)


def test_worker_answers_text_jobs_while_a_forward_runs(held):
    held.load()
    held.send(submit(1, max_tokens=3))
    assert held.event(1, Started).id == 1
    assert held.backend.entered.wait(WAIT_S)
    held.send(TextJob(2, token_ids=[65]))
    assert held.next(TextResult) == TextResult(2, raw=b"A")
    held.backend.release()
    assert held.event(1, Finished).id == 1


def test_worker_cancel_inside_a_forward_of_one_sequence_ends_it_at_once(held):
    held.load()
    held.send(submit(1, max_tokens=LONG))
    assert held.backend.entered.wait(WAIT_S)
    held.send(Cancel(1))
    # Nobody releases the forward: only the interruption can end it.
    assert held.event(1, Ended) == Ended(1)


def test_worker_cancel_of_a_sequence_that_waits_for_credit_ends_it(bench):
    bench.load()
    bench.send(submit(1, max_tokens=LONG, credit=1))
    bench.event(1, Delta)
    bench.send(Cancel(1))
    assert bench.event(1, Ended) == Ended(1)


def test_worker_credit_wakes_an_idle_owner(bench):
    bench.load()
    bench.send(submit(1, max_tokens=3, credit=1))
    bench.event(1, Delta)
    bench.send(Credit(1, 10))
    assert bench.event(1, Finished).usage.completion_tokens == 3


def test_worker_wrong_request_ends_with_its_error(bench):
    bench.load()
    bench.send(submit(1, max_tokens=9999))
    assert bench.event(1, Ended).error.reason == "CONTEXT_LENGTH_EXCEEDED"


@pytest.mark.parametrize(("busy", "threads"), [(1, 3), (2, 2), (3, 1), (9, 1)])
def test_worker_share_divides_the_cores_up_to_the_threads_asked_for(bench, busy, threads):
    bench.load(msgspec.structs.replace(OPTIONS, threads=3))
    bench.send(Share(busy), submit(1, max_tokens=1))
    bench.event(1, Finished)
    assert bench.backend.threads == threads


def test_worker_stop_ends_the_run_while_a_forward_is_held(held):
    held.load()
    held.send(submit(1, max_tokens=3))
    assert held.backend.entered.wait(WAIT_S)
    held.send(Stop())
    assert held.join()


def test_worker_closed_socket_ends_the_run(bench):
    bench.load()
    bench.peer.close()
    assert bench.join()
