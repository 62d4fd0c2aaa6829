"""The text thread: jobs in order, cancels before and after, and templates that run for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from bear_grpc.backend.base import Matcher
from bear_grpc.engine.sequence import Sequence
from bear_grpc.params import (
    ChatInput,
    ChatTurn,
    Constraint,
    ConstraintKind,
    PromptInput,
    SamplingParams,
    StopParams,
)
from bear_grpc.protocol import Ended, Frame, Step, Submit, TextJob, TextResult
from bear_grpc.testing import FakeVocabulary
from bear_grpc.worker import text
from bear_grpc.worker.exits import EXIT_BROKEN
from bear_grpc.worker.text import Preparer, TextThread

WAIT_S = 20
# Every `range` is small enough for the sandbox; together they take years.
ENDLESS = "{% for a in range(9999) %}" * 5 + "{% endfor %}" * 5
FAILING = RuntimeError("an inside that no caller may see")


class GatedVocabulary(FakeVocabulary):
    """Holds the thread inside a job until the gate opens."""

    def __init__(self, **changes: object) -> None:
        super().__init__(**changes)
        self.inside, self.gate = threading.Event(), threading.Event()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if text == "gate":
            self.inside.set()
            self.gate.wait(WAIT_S)
        if text == "fail":
            raise FAILING
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)


class Bench:
    """A running text thread, and what comes out of it."""

    def __init__(self, vocabulary: GatedVocabulary, limit_s: float) -> None:
        self.vocabulary = vocabulary
        self.out: queue.SimpleQueue[Frame | Sequence] = queue.SimpleQueue()
        self.thread = TextThread(
            Preparer(vocabulary, 1024), post=self.out.put, to_owner=self.out.put, limit_s=limit_s
        )
        self.thread.launch()

    def end(self) -> None:
        """Native code that a thread is in at the end of the process would take the process with it."""
        self.vocabulary.gate.set()
        self.thread.close()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()

    def next(self) -> Frame | Sequence:
        return self.out.get(timeout=WAIT_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(GatedVocabulary(), limit_s=1000.0)
    yield made
    made.end()


@pytest.fixture
def endless() -> Iterator[Bench]:
    """Every chat runs for ever, and is overdue at once."""
    made = Bench(GatedVocabulary(template=ENDLESS), limit_s=0.0)
    yield made
    made.end()


def submit(id: int, text: str = "hello") -> Submit:
    return Submit(id, PromptInput(text), SamplingParams(), StopParams(), 0.0)


def chat_job(id: int) -> TextJob:
    return TextJob(id, ChatInput([ChatTurn("user", "hi")]))


def interrupt_until_answered(bench: Bench) -> Frame | Sequence:
    """What the I/O thread's tick does, until the thread gives something."""
    for _ in range(WAIT_S * 100):
        bench.thread.interrupt_overdue()
        try:
            return bench.out.get(timeout=0.01)
        except queue.Empty:
            continue
    raise AssertionError("the text thread does not answer")


def test_submit_goes_on_to_the_owner_as_a_sequence(bench):
    bench.thread.put(submit(1))
    made = bench.next()
    assert isinstance(made, Sequence)
    assert (made.id, made.num_prompt) == (1, 6)


def test_text_job_is_answered(bench):
    bench.thread.put(TextJob(2, token_ids=[65, 66]))
    assert bench.next() == TextResult(2, raw=b"AB")


def test_jobs_are_served_in_order(bench):
    for id in range(10):
        bench.thread.put(TextJob(id, token_ids=[65 + id]) if id % 2 else submit(id))
    assert [bench.next().id for _ in range(10)] == list(range(10))


def test_submit_that_is_wrong_ends_with_its_error(bench):
    bench.thread.put(Submit(1, PromptInput("x"), SamplingParams(), StopParams(max_tokens=9999), 0.0))
    [ending] = bench.next().events
    assert (ending.id, ending.error.reason) == (1, "CONTEXT_LENGTH_EXCEEDED")


def test_text_job_that_is_wrong_is_answered_with_its_error(bench):
    bench.thread.put(TextJob(1, token_ids=[-1]))
    answer = bench.next()
    assert (answer.id, answer.error.reason, answer.raw) == (1, "INVALID_FIELD", b"")


@pytest.mark.parametrize("job", [submit(1, "fail"), TextJob(1, PromptInput("fail"))], ids=["submit", "job"])
def test_unexpected_exception_ends_internal_without_its_text(bench, job):
    bench.thread.put(job)
    answer = bench.next()
    error = answer.events[0].error if isinstance(answer, Step) else answer.error
    assert error.reason == "INTERNAL"
    assert "inside" not in error.message
    bench.thread.put(submit(2))
    assert bench.next().id == 2


def test_cancel_of_a_job_that_waits_ends_it_without_error(bench):
    bench.thread.put(submit(1, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    bench.thread.put(submit(2))
    assert bench.thread.cancel(2) is True
    bench.vocabulary.gate.set()
    assert bench.next().id == 1
    assert bench.next() == Step([Ended(2)])


def test_cancel_of_the_job_under_way_ends_it_without_error(bench):
    bench.thread.put(submit(1, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    assert bench.thread.cancel(1) is True
    bench.vocabulary.gate.set()
    assert bench.next() == Step([Ended(1)])


def test_cancel_twice_ends_it_once(bench):
    bench.thread.put(submit(1, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    assert [bench.thread.cancel(1), bench.thread.cancel(1)] == [True, True]
    bench.vocabulary.gate.set()
    assert bench.next() == Step([Ended(1)])
    bench.thread.put(submit(2))
    assert bench.next().id == 2


def test_cancel_of_a_job_that_fails_tells_no_error(bench):
    bench.thread.put(submit(1, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    bench.thread.put(submit(2, "fail"))
    bench.thread.cancel(2)
    bench.vocabulary.gate.set()
    assert bench.next().id == 1
    assert bench.next() == Step([Ended(2)])


def several(id: int, n: int, text: str = "hello", **changes: object) -> Submit:
    return Submit(id, PromptInput(text), SamplingParams(), StopParams(), 0.0, n=n, **changes)


def test_submit_of_several_answers_goes_on_as_so_many_sequences(bench):
    bench.thread.put(several(5, 3))
    bench.thread.put(submit(8))
    assert [bench.next().id for _ in range(4)] == [5, 6, 7, 8]


def test_submit_of_several_answers_that_is_wrong_ends_each_with_the_error(bench):
    bench.thread.put(several(5, 3, "fail"))
    endings = bench.next().events
    assert [(ending.id, ending.error.reason) for ending in endings] == [(id, "INTERNAL") for id in (5, 6, 7)]


def test_submit_with_a_constraint_that_does_not_compile_ends_grammar_invalid(bench):
    bench.thread.put(several(5, 2, constraint=Constraint(ConstraintKind.REGEX, text="(")))
    endings = bench.next().events
    assert [(ending.id, ending.error.reason) for ending in endings] == [
        (5, "GRAMMAR_INVALID"),
        (6, "GRAMMAR_INVALID"),
    ]


def test_submit_whose_min_tokens_do_not_fit_ends_with_the_field(bench):
    bench.thread.put(Submit(1, PromptInput("x"), SamplingParams(), StopParams(min_tokens=1024), 0.0))
    [ending] = bench.next().events
    assert ending.error.reason == "INVALID_FIELD"
    assert "stop.min_tokens" in ending.error.message


def test_cancel_of_one_of_several_answers_leaves_the_others(bench):
    bench.thread.put(several(5, 3, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    assert bench.thread.cancel(6) is True
    bench.vocabulary.gate.set()
    assert [bench.next().id, bench.next().id] == [5, 7]
    assert bench.next() == Step([Ended(6)])
    assert [bench.thread.cancel(id) for id in (5, 6, 7)] == [False] * 3


def test_cancel_of_all_of_several_answers_ends_each_once(bench):
    bench.thread.put(several(5, 3, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    assert all(bench.thread.cancel(id) for id in (7, 5, 6))
    bench.vocabulary.gate.set()
    assert bench.next() == Step([Ended(5), Ended(6), Ended(7)])


def test_cancel_of_one_of_several_answers_that_fail_tells_no_error_of_that_one(bench):
    bench.thread.put(submit(1, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    bench.thread.put(several(5, 2, "fail"))
    bench.thread.cancel(6)
    bench.vocabulary.gate.set()
    assert bench.next().id == 1
    failed, cancelled = bench.next().events
    assert (failed.id, failed.error.reason) == (5, "INTERNAL")
    assert cancelled == Ended(6)


def test_cancel_after_it_went_on_is_the_owners(bench):
    bench.thread.put(submit(1))
    bench.next()
    assert bench.thread.cancel(1) is False


def test_cancel_of_an_unknown_id_is_not_taken(bench):
    assert bench.thread.cancel(99) is False


def test_template_that_runs_for_ever_is_interrupted_and_named(endless):
    endless.thread.put(chat_job(1))
    answer = interrupt_until_answered(endless)
    assert (answer.id, answer.error.reason) == (1, "INVALID_FIELD")
    assert "takes more than 0 s" in answer.error.message


def test_thread_survives_many_interrupted_jobs(endless):
    for id in range(5):
        endless.thread.put(chat_job(id))
        assert interrupt_until_answered(endless).id == id
    endless.thread.put(submit(9))
    assert endless.next().id == 9
    assert endless.thread.is_alive()


def test_interrupt_at_the_very_end_of_a_job_is_waited_for_and_hits_no_other(endless):
    """Job after job, each overdue at once, with interrupts at any moment: each is answered once, in order,
    with its result or with the time-out, and no interrupt arrives where it would end the thread."""
    count = 300
    for id in range(count):
        endless.thread.put(TextJob(id, PromptInput("x" * 50)))
    answers: list[TextResult] = []
    while len(answers) < count:
        endless.thread.interrupt_overdue()
        try:
            answers.append(endless.out.get_nowait())
        except queue.Empty:
            continue
    assert [answer.id for answer in answers] == list(range(count))
    assert all(len(answer.ids) == 4 * 51 for answer in answers if answer.error is None)
    assert all(answer.error.reason == "INVALID_FIELD" for answer in answers if answer.error is not None)
    assert endless.thread.is_alive()


class LateThread(TextThread):
    """Its interrupter stops between the decision to interrupt and the interruption."""

    def __init__(self, *args: object, **changes: object) -> None:
        super().__init__(*args, **changes)
        self.decided, self.go_on = threading.Event(), threading.Event()

    @property
    def ident(self) -> int | None:
        if threading.current_thread() is not self:
            self.decided.set()
            self.go_on.wait(WAIT_S)
        return super().ident


def test_interrupt_decided_before_and_sent_after_the_end_of_a_job_is_waited_for():
    """It would hit the thread's own code otherwise, and end it."""
    vocabulary: GatedVocabulary = GatedVocabulary()
    out: queue.SimpleQueue[Frame | Sequence] = queue.SimpleQueue()
    thread = LateThread(Preparer(vocabulary, 1024), post=out.put, to_owner=out.put, limit_s=0.0)
    thread.go_on.set()
    thread.launch()
    thread.go_on.clear()
    thread.put(TextJob(1, PromptInput("gate")))
    assert vocabulary.inside.wait(WAIT_S)
    interrupter = threading.Thread(target=thread.interrupt_overdue)
    thread.decided.clear()
    interrupter.start()
    assert thread.decided.wait(WAIT_S)
    vocabulary.gate.set()
    with pytest.raises(queue.Empty):
        out.get(timeout=0.1)
    thread.go_on.set()
    assert out.get(timeout=WAIT_S).error.reason == "INVALID_FIELD"
    thread.put(submit(2))
    assert out.get(timeout=WAIT_S).id == 2
    thread.close()
    thread.join(WAIT_S)


def test_interrupt_without_a_job_does_nothing(endless):
    endless.thread.interrupt_overdue()
    endless.thread.put(submit(1))
    assert endless.next().id == 1


def test_interrupt_of_a_job_within_its_time_does_nothing(bench):
    bench.thread.put(submit(1, "gate"))
    assert bench.vocabulary.inside.wait(WAIT_S)
    bench.thread.interrupt_overdue()
    bench.vocabulary.gate.set()
    assert isinstance(bench.next(), Sequence)


class BrokenConstraints(GatedVocabulary):
    """Its constraints fail, as an error or as a panic of native code."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.tried = error, threading.Event()

    def compile(self, constraint: Constraint) -> Matcher:
        self.tried.set()
        raise self.error


def test_warm_up_that_fails_leaves_the_thread_serving(monkeypatch):
    monkeypatch.setattr(text, "IDLE_S", 0.0)
    vocabulary = BrokenConstraints(FAILING)
    made = Bench(vocabulary, limit_s=1000.0)
    assert vocabulary.tried.wait(WAIT_S)
    made.thread.put(submit(1))
    assert made.next().id == 1
    made.end()


def test_panic_of_native_code_ends_the_process_and_leaves_nobody_waiting(monkeypatch):
    """A thread that died quietly would let every later request wait for ever."""
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(text.os, "_exit", codes.put)
    made = Bench(BrokenConstraints(BaseException("panic")), limit_s=1000.0)
    asked = Constraint(ConstraintKind.REGEX, "a")
    made.thread.put(Submit(1, PromptInput("x"), SamplingParams(), StopParams(), 0.0, constraint=asked))
    assert codes.get(timeout=WAIT_S) == EXIT_BROKEN
    made.end()


def test_close_ends_an_idle_thread_without_a_warm_up():
    vocabulary = BrokenConstraints(FAILING)
    made = Bench(vocabulary, limit_s=1000.0)
    made.end()
    assert not vocabulary.tried.is_set()
