"""An answer that is cut off after any of its events goes on in another engine as if nothing had been."""

from __future__ import annotations

import pytest

from bear_grpc.engine.echo import Echo
from bear_grpc.engine.resume import take_up
from bear_grpc.engine.stop import TextMachine
from bear_grpc.errors import BackendError
from bear_grpc.executor.journal import Journal
from bear_grpc.params import Constraint, ConstraintKind, OutputParams, SamplingParams, StopParams
from bear_grpc.protocol import Delta, Ended, Finished, Resume, SequenceEvent
from bear_grpc.testing import FakeVocabulary
from tests.engine.harness import GREEDY, Harness

PROMPT = "the prompt"
LENGTH = 12
CASES = {
    "greedy": {},
    "penalties": {"sampling": SamplingParams(temperature=0, repetition_penalty=2.0, frequency_penalty=1.0)},
    "seed": {"sampling": SamplingParams(seed=9, temperature=1.5, xtc_probability=0.5)},
    "mirostat": {"sampling": SamplingParams(seed=9, temperature=1.0, mirostat=2)},
    "adaptive-p": {"sampling": SamplingParams(seed=9, temperature=1.0, adaptive_p_target=0.4)},
    "echo": {"output": OutputParams(echo=True)},
    "echo with log probabilities": {"output": OutputParams(echo=True, logprobs=True)},
    "constraint": {"constraint": Constraint(ConstraintKind.CHOICES, choices=("abcdefgh", "abxdefgh"))},
}


def begin(harness: Harness, options: dict, resume: Resume | None = None, credit: int = 1000) -> None:
    """Submits the request as the text thread does."""
    given = dict(options)
    stop = given.pop("stop", StopParams(ignore_eos="constraint" not in given))
    constraint = given.pop("constraint", None)
    vocabulary = FakeVocabulary()
    output = given.get("output", OutputParams())
    given["matcher"] = None if constraint is None else vocabulary.compile(constraint)
    given["echo"] = Echo() if output.echo else None
    engine = harness.engine
    taken = []
    engine.submit, submit = taken.append, engine.submit
    sampling = given.pop("sampling", GREEDY)
    sequence = harness.submit(
        1, PROMPT, sampling=sampling, stop=stop, max_tokens=LENGTH, credit=credit, want_tokens=False, **given
    )
    engine.submit = submit
    if resume is not None:
        take_up(sequence, resume, vocabulary, lambda: TextMachine(stop.sequences))
    engine.submit(sequence)


def run(harness: Harness) -> list[SequenceEvent]:
    while harness.engine.step():
        pass
    return [event for step in harness.steps for event in step.events]


def text(events: list[SequenceEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def check_every_cut(options: dict) -> None:
    harness = Harness()
    begin(harness, options)
    whole = run(harness)
    assert isinstance(whole[-1], Finished)
    for cut in range(len(whole)):
        journal = Journal()
        for event in whole[:cut]:
            assert journal.take(event) is event
        other = Harness()
        begin(other, options, journal.resume())
        rest = [event for event in map(journal.take, run(other)) if event is not None]
        assert text(whole[:cut] + rest) == text(whole), cut
        end = rest[-1]
        assert isinstance(end, Finished)
        assert (end.reason, end.cause, end.usage.completion_tokens, end.usage.prompt_tokens) == (
            whole[-1].reason,
            whole[-1].cause,
            whole[-1].usage.completion_tokens,
            whole[-1].usage.prompt_tokens,
        )
        assert end.satisfied == whole[-1].satisfied


@pytest.mark.parametrize("name", CASES)
def test_every_cut(name):
    check_every_cut(CASES[name])


def test_every_cut_around_a_stop_sequence():
    harness = Harness()
    begin(harness, {})
    shown = text(run(harness))
    for length in (2, 4):
        stop = StopParams(ignore_eos=True, sequences=(shown[5 : 5 + length], "never"))
        check_every_cut({"stop": stop})


def test_an_answer_goes_on_only_when_its_reader_has_taken_what_there_is():
    harness = Harness(stall_timeout_s=5.0)
    begin(harness, {}, Resume(b"", 0), credit=0)
    assert not run(harness)[1:]
    harness.clock.advance(5.0)
    (end,) = [event for event in run(harness) if isinstance(event, Ended)]
    assert end.error.reason == "SLOW_CONSUMER"


@pytest.mark.parametrize(
    "resume",
    [Resume(b"\x01\x00\x00", 0), Resume(b"\xff\xff\xff\x7f", 0), Resume(b"\xff\xff\xff\xff", 0)],
    ids=["half a token", "too large", "negative"],
)
def test_what_no_worker_can_have_said_is_refused(resume):
    with pytest.raises(BackendError):
        begin(Harness(), {}, resume)


def test_text_that_is_less_than_that_of_its_tokens_is_refused():
    ids = b"".join(id.to_bytes(4, "little") for id in b"abc")
    with pytest.raises(BackendError):
        begin(Harness(), {}, Resume(ids, 2))
