"""The engine, one behaviour at a time."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from bear_grpc.backend.base import Outcome
from bear_grpc.engine.engine import EngineBroken
from bear_grpc.engine.sampling import draw, uniform
from bear_grpc.params import SamplingParams, StopParams
from bear_grpc.protocol import Delta, Ended, Finished, Started
from bear_grpc.testing import FakeSampler, FakeVocabulary
from bear_grpc.types import FinishReason, StopCause, Usage
from tests.engine.harness import GREEDY, Harness, alone

IGNORE = StopParams(ignore_eos=True)
FAILURES = [Outcome.INVALID, Outcome.FAILED]


@pytest.fixture
def harness() -> Harness:
    return Harness()


def forced(token: int, **changes: object) -> SamplingParams:
    """Draws this token always."""
    return SamplingParams(temperature=0, repetition_penalty=1, logit_bias=((token, 1000.0),), **changes)


def text_of(token: int) -> str:
    return bytes([token]).decode(errors="replace")


# ---- events and endings -----------------------------------------------------------------------------


def test_sequence_gets_started_then_deltas_then_one_ending(harness):
    harness.submit(1, "hello", sampling=forced(65), max_tokens=3)
    harness.run()
    kinds = [type(event) for event in harness.events(1)]
    assert kinds == [Started, Delta, Delta, Delta, Finished]


def test_started_tells_prompt_and_max_tokens(harness):
    harness.submit(1, "hello", max_tokens=3)
    harness.step()
    assert harness.events(1)[0] == Started(1, prompt_tokens=5, cached_tokens=0, max_tokens=3)


def test_step_without_work_is_false_and_emits_nothing(harness):
    assert harness.step() is False
    assert harness.steps == []


def test_step_events_of_all_its_sequences_come_in_one_frame_their_starts_before_it(harness):
    harness.submit(1, "a")
    harness.submit(2, "b")
    harness.step()
    frames = [[(type(event), event.id) for event in step.events] for step in harness.steps]
    assert frames == [[(Started, 1), (Started, 2)], [(Delta, 1), (Delta, 2)]]


def test_start_of_a_sequence_is_told_before_its_first_forward(harness):
    told = []
    forward = harness.backend.forward
    harness.backend.forward = lambda batch: told.extend(harness.steps) or forward(batch)
    harness.submit(1, "a")
    harness.step()
    assert [type(event) for step in told for event in step.events] == [Started]


def test_delta_has_tokens_only_if_asked_for(harness):
    harness.submit(1, "a", max_tokens=1, want_tokens=False)
    harness.run()
    [delta] = [event for event in harness.events(1) if isinstance(event, Delta)]
    assert (delta.tokens, delta.count) == ([], 1)


def test_timings_follow_the_injected_clock(harness):
    harness.submit(1, "hello hello", max_tokens=3)  # 11 tokens: two chunks of at most 8
    harness.run()
    timings = harness.endings(1)[0].timings
    assert timings.queue_s == pytest.approx(0.01)
    assert timings.prefill_s == pytest.approx(0.01)
    assert timings.decode_s == pytest.approx(0.02)
    assert timings.total_s == pytest.approx(0.04)


def test_timings_queue_time_is_that_of_the_wait_for_a_slot():
    harness = Harness(max_sequences=1)
    harness.submit(1, "a", max_tokens=5)
    harness.submit(2, "b", max_tokens=1)
    harness.run()
    assert harness.endings(2)[0].timings.queue_s == pytest.approx(0.06)


# ---- when it ends -----------------------------------------------------------------------------------


def test_max_tokens_0_reads_the_prompt_only_and_ends_length(harness):
    harness.submit(1, "hello hello", max_tokens=0)
    harness.run()
    result = harness.result(1)
    assert (result.text, result.ids, result.reason) == ("", (), FinishReason.LENGTH)
    assert result.usage == Usage(11, 0, 0)
    assert not any(row[3] for batch in harness.backend.batches for row in batch)


def test_max_tokens_1_draws_one_token_in_one_step(harness):
    harness.submit(1, "hello", max_tokens=1)
    harness.run()
    result = harness.result(1)
    assert (len(result.ids), result.reason, result.usage) == (1, FinishReason.LENGTH, Usage(5, 0, 1))
    assert len(harness.backend.batches) == 1


def test_eog_token_ends_the_text_without_being_part_of_it(harness):
    eos = harness.backend.vocabulary.eos
    harness.submit(1, "hello", sampling=forced(eos), stop=StopParams())
    harness.run()
    result = harness.result(1)
    assert (result.text, result.ids, result.usage) == ("", (eos,), Usage(5, 0, 1))
    assert (result.reason, result.cause) == (FinishReason.STOP, StopCause(eog_token=eos))


def test_eog_token_ignored_goes_on_to_max_tokens(harness):
    eos = harness.backend.vocabulary.eos
    harness.submit(1, "hello", sampling=forced(eos), stop=IGNORE, max_tokens=4)
    harness.run()
    result = harness.result(1)
    assert (result.text, result.ids, result.reason) == ("", (eos,) * 4, FinishReason.LENGTH)


def test_eog_token_as_last_of_max_tokens_is_told_as_stop(harness):
    eos = harness.backend.vocabulary.eos
    harness.submit(1, "hello", sampling=forced(eos), stop=StopParams(), max_tokens=1)
    harness.run()
    assert harness.result(1).reason is FinishReason.STOP


def test_stop_token_ends_the_text_without_being_part_of_it(harness):
    harness.submit(1, "hello", sampling=forced(65), stop=StopParams(token_ids=(65,)))
    harness.run()
    result = harness.result(1)
    assert (result.text, result.cause) == ("", StopCause(token_id=65))


def test_stop_token_that_is_eog_too_counts_even_if_eog_is_ignored(harness):
    eos = harness.backend.vocabulary.eos
    stop = StopParams(token_ids=(eos,), ignore_eos=True)
    harness.submit(1, "hello", sampling=forced(eos), stop=stop)
    harness.run()
    assert harness.result(1).cause == StopCause(token_id=eos)


def test_stop_sequence_over_several_tokens_is_cut_off(harness):
    harness.submit(1, "hello", sampling=forced(65), stop=StopParams(sequences=("AAA",)))
    harness.run()
    result = harness.result(1)
    assert (result.text, result.cause) == ("", StopCause(sequence="AAA"))
    assert result.usage == Usage(5, 0, 3)


def test_stop_sequence_begun_at_the_end_of_max_tokens_is_shown(harness):
    stop = StopParams(sequences=("AAAA",))
    harness.submit(1, "hello", sampling=forced(65), stop=stop, max_tokens=3)
    harness.run()
    result = harness.result(1)
    assert (result.text, result.reason, result.cause) == ("AAA", FinishReason.LENGTH, None)


def test_stop_sequence_held_back_is_shown_when_eog_comes():
    harness = Harness()
    eos = harness.backend.vocabulary.eos
    # The prompt's tokens are never drawn again: after one A comes the next best, EOS.
    sampling = SamplingParams(
        temperature=0,
        repetition_penalty=1,
        repetition_window=-1,
        presence_penalty=2,
        logit_bias=((65, 1000.0), (eos, 999.0)),
    )
    harness.submit(1, "hello", sampling=sampling, stop=StopParams(sequences=("AB",)))
    harness.run()
    result = harness.result(1)
    assert (result.text, result.ids, result.cause) == ("A", (65, eos), StopCause(eog_token=eos))


def test_half_a_character_at_the_end_becomes_a_replacement(harness):
    harness.submit(1, "hello", sampling=forced(0xE2), max_tokens=1)
    harness.run()
    assert harness.result(1).text == "\ufffd"


def test_control_token_drawn_is_not_part_of_the_text(harness):
    token = harness.backend.vocabulary.control("<|user|>")
    harness.submit(1, "hello", sampling=forced(token), max_tokens=2)
    harness.run()
    result = harness.result(1)
    assert (result.text, result.ids) == ("", (token, token))
    [first, _] = [event for event in harness.events(1) if isinstance(event, Delta)]
    assert first.tokens[0].piece == b"<|user|>"


def test_context_filled_to_the_last_token_ends_length():
    harness = Harness(context_length=12)
    harness.submit(1, "hello", max_tokens=7)
    harness.run()
    assert harness.result(1).usage == Usage(5, 0, 7)


# ---- sampling ---------------------------------------------------------------------------------------


def test_plain_greedy_makes_no_sampler_and_takes_the_maximum(harness):
    harness.submit(1, "hello", sampling=GREEDY, max_tokens=1)
    harness.run()
    logits = harness.backend._logits_after(list(b"hello"))
    assert harness.result(1).ids == (int(np.argmax(logits)),)
    assert harness.backend.samplers == []


def test_draw_uses_the_seed_and_the_place_of_the_token_in_its_sequence(harness):
    """So a sequence that is computed again, after a preemption or elsewhere, goes on with the same draws."""
    params = SamplingParams(seed=5, temperature=5, top_k=0, top_p=1, repetition_penalty=1)
    harness.submit(1, "hello", sampling=params, max_tokens=6)
    harness.run()
    tokens = list(b"hello")
    for _ in range(6):
        ids, logits = FakeSampler(params).candidates(harness.backend._logits_after(tokens))
        tokens.append(draw(ids, logits, uniform(5, 0, len(tokens))))
    assert harness.result(1).ids == tuple(tokens[5:])


def test_penalties_see_the_prompt(harness):
    """A greedy draw that would repeat a token of the prompt is turned away by a penalty on it."""
    first = alone("hello", max_tokens=1).ids[0]
    prompt = [first, *b"hello"]
    free = alone(prompt, max_tokens=1, sampling=forced(first)).ids[0]
    penalised = SamplingParams(
        temperature=0,
        repetition_penalty=1,
        repetition_window=-1,
        presence_penalty=2,
        logit_bias=((first, 1.0),),
    )
    harness.submit(1, prompt, sampling=penalised, max_tokens=1)
    harness.run()
    logits = harness.backend._logits_after(prompt).astype(np.float64)
    logits[first] += 1
    for token in set(prompt):
        logits[token] -= 2
    assert free == first
    assert harness.result(1).ids == (int(np.argmax(logits)),)


def test_penalties_window_shorter_than_the_prompt_sees_its_end_only(harness):
    sampling = SamplingParams(
        temperature=0, repetition_penalty=1, repetition_window=2, presence_penalty=2, logit_bias=((104, 0.0),)
    )
    harness.submit(1, "hello", sampling=sampling, max_tokens=1)
    harness.run()
    logits = harness.backend._logits_after(list(b"hello")).astype(np.float64)
    for token in b"lo":
        logits[token] -= 2
    assert harness.result(1).ids == (int(np.argmax(logits)),)


def test_sampler_is_closed_when_its_sequence_ends(harness):
    harness.submit(1, "hello", sampling=SamplingParams(), max_tokens=2)
    harness.run()
    assert [sampler.closed for sampler in harness.backend.samplers] == [True]


# ---- cancel and credit ------------------------------------------------------------------------------


def test_cancel_waiting_ends_it_without_started():
    harness = Harness(max_sequences=1)
    harness.submit(1, "hello")
    harness.submit(2, "hello")
    harness.step()
    harness.engine.cancel(2)
    harness.step()
    assert harness.events(2) == [Ended(2)]


def test_cancel_running_frees_slot_and_kv_for_the_next():
    harness = Harness(max_sequences=1)
    harness.submit(1, "hello", max_tokens=100)
    harness.submit(2, "other", max_tokens=2)
    harness.step()
    harness.engine.cancel(1)
    harness.run()
    assert harness.result(2) == alone("other", max_tokens=2)
    assert harness.is_clean()


def test_cancel_is_told_by_a_step_without_work(harness):
    harness.submit(1, "hello")
    harness.engine.cancel(1)
    assert harness.step() is False
    assert harness.events(1) == [Ended(1)]


@pytest.mark.parametrize("id", [1, 99])
def test_cancel_of_what_has_ended_or_never_was_does_nothing(harness, id):
    harness.submit(1, "hello", max_tokens=1)
    harness.run()
    before = list(harness.events(id))
    harness.engine.cancel(id)
    harness.run()
    assert harness.events(id) == before
    assert harness.engine.stats().cancelled == 0


def test_credit_used_up_pauses_the_sequence_and_keeps_its_slot(harness):
    harness.submit(1, "hello", max_tokens=5, credit=2)
    harness.run()
    assert len([event for event in harness.events(1) if isinstance(event, Delta)]) == 2
    assert harness.endings(1) == []
    assert harness.engine.stats().running == 1


def test_credit_returned_goes_on_where_it_stopped(harness):
    harness.submit(1, "hello", max_tokens=5, credit=2)
    harness.run()
    harness.engine.add_credit(1, 10)
    harness.run()
    assert harness.result(1) == alone("hello", max_tokens=5)


def test_stall_over_the_timeout_ends_slow_consumer_and_frees_the_slot(harness):
    harness.submit(1, "hello", credit=1)
    harness.run()
    harness.clock.advance(30)
    harness.run()
    assert harness.result(1).error.reason == "SLOW_CONSUMER"
    assert harness.is_clean()
    assert harness.engine.stats().failed == 1


def test_stall_shorter_than_the_timeout_is_no_ending(harness):
    harness.submit(1, "hello", credit=1)
    harness.step()
    assert harness.engine.seconds_to_event() == pytest.approx(30)
    harness.clock.advance(29.9)
    harness.engine.step()
    assert harness.endings(1) == []
    assert harness.engine.seconds_to_event() == pytest.approx(0.1)


def test_stall_ended_by_credit_starts_again_from_0(harness):
    harness.submit(1, "hello", credit=1)
    harness.run()
    harness.clock.advance(29)
    harness.engine.add_credit(1, 1)
    assert harness.engine.seconds_to_event() is None
    harness.run()
    harness.clock.advance(29)
    harness.run()
    assert harness.endings(1) == []


def test_credit_used_up_by_the_last_token_is_no_stall(harness):
    harness.submit(1, "hello", max_tokens=2, credit=2)
    harness.run()
    harness.clock.advance(100)
    harness.run()
    assert harness.result(1).reason is FinishReason.LENGTH


# ---- failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", FAILURES)
def test_failure_ends_the_sequences_of_the_step_with_internal(harness, outcome):
    harness.submit(1, "hello")
    harness.backend.fail_next(outcome)
    harness.run()
    assert harness.result(1).error.reason == "INTERNAL"
    assert harness.is_clean()


@pytest.mark.parametrize("outcome", FAILURES)
def test_failure_leaves_later_sequences_alone(harness, outcome):
    harness.submit(1, "hello")
    harness.backend.fail_next(outcome, kept=3)
    harness.run()
    harness.submit(2, "hello", max_tokens=3)
    harness.run()
    assert harness.result(2) == alone("hello", max_tokens=3)


def test_failure_tells_no_cause_of_the_inside(harness):
    harness.submit(1, "hello")
    harness.backend.fail_next(Outcome.FAILED)
    harness.run()
    assert harness.result(1).error.message == "the computation failed"


def test_two_failures_in_a_row_raise_engine_broken_after_both_endings_are_told():
    harness = Harness(max_sequences=1)
    harness.submit(1, "hello")
    harness.submit(2, "hello")
    harness.backend.fail_next(Outcome.FAILED, Outcome.INVALID)
    with pytest.raises(EngineBroken, match="INVALID"):
        harness.run()
    assert [harness.result(id).error.reason for id in (1, 2)] == ["INTERNAL", "INTERNAL"]


def test_two_failures_with_a_good_step_between_do_not_break_the_engine():
    harness = Harness(max_sequences=1)
    for id in (1, 2, 3):
        harness.submit(id, "hello", max_tokens=1)
    harness.backend.fail_next(Outcome.FAILED, Outcome.DONE, Outcome.FAILED)
    harness.run()
    assert [harness.result(id).error is not None for id in (1, 2, 3)] == [True, False, True]


# ---- abort and interrupt ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", range(9))
def test_abort_in_prefill_after_any_rows_resumes_with_the_same_output(kept):
    harness = Harness()
    harness.submit(1, "hello hello hello", max_tokens=4)
    harness.step()
    harness.backend.fail_next(Outcome.ABORTED, kept=kept)
    harness.run()
    assert harness.result(1) == alone("hello hello hello", max_tokens=4)
    # What was kept is not computed again, but for the token that gives the logits.
    assert harness.backend.batches[2][0][1] == min(8 + kept, 16)


def test_abort_after_the_whole_prompt_computes_its_last_token_again(harness):
    harness.submit(1, "hello", max_tokens=4)
    harness.backend.fail_next(Outcome.ABORTED, kept=5)
    harness.run()
    assert harness.result(1) == alone("hello", max_tokens=4)
    assert [row[1] for row in harness.backend.batches[1]] == [4]


@pytest.mark.parametrize("kept", [0, 1])
def test_abort_in_decode_resumes_with_the_same_output(harness, kept):
    harness.submit(1, "hello", max_tokens=4)
    harness.step()
    harness.backend.fail_next(Outcome.ABORTED, kept=kept)
    harness.run()
    assert harness.result(1) == alone("hello", max_tokens=4)


@pytest.mark.parametrize("decoding", [False, True])
def test_abort_of_a_model_that_cannot_be_cut_computes_all_again(decoding):
    harness = Harness(can_cut=False)
    harness.submit(1, "hello", max_tokens=4)
    if decoding:
        harness.step()
    harness.backend.fail_next(Outcome.ABORTED, kept=5)
    harness.run()
    assert harness.result(1) == alone("hello", max_tokens=4)


def test_abort_does_not_count_as_a_failure():
    harness = Harness(max_sequences=1)
    harness.submit(1, "hello", max_tokens=1)
    harness.backend.fail_next(*[Outcome.ABORTED] * 5)
    harness.run()
    assert harness.result(1) == alone("hello", max_tokens=1)


def test_interrupt_of_the_only_sequence_of_a_step_aborts_it(harness):
    harness.submit(1, "hello", max_tokens=3)
    harness.backend.during = lambda: harness.engine.interrupt(1)
    harness.step()
    assert harness.backend.kv_tokens(0) == []
    harness.backend.during = lambda: None
    harness.run()
    assert harness.result(1) == alone("hello", max_tokens=3)


def test_interrupt_of_one_of_two_sequences_lets_the_step_run(harness):
    harness.submit(1, "a")
    harness.submit(2, "b")
    harness.backend.during = lambda: harness.engine.interrupt(1)
    harness.step()
    assert [len(harness.events(id)) for id in (1, 2)] == [2, 2]


def test_interrupt_of_a_sequence_that_is_not_in_the_step_lets_it_run():
    harness = Harness(max_sequences=1)
    harness.submit(1, "a")
    harness.submit(2, "b")
    harness.backend.during = lambda: harness.engine.interrupt(2)
    harness.step()
    assert len(harness.events(1)) == 2


def test_interrupt_between_steps_does_not_touch_the_next(harness):
    harness.submit(1, "hello", max_tokens=3)
    harness.step()
    harness.engine.interrupt(1)
    harness.step()
    assert len([event for event in harness.events(1) if isinstance(event, Delta)]) == 2


def test_interrupt_from_another_thread_ends_a_forward_that_is_held():
    """The I/O thread's cancel: the owner is inside a native call and sees the flag there."""
    made: list[Harness] = []
    ready = threading.Event()

    def own() -> None:
        harness = Harness()
        harness.backend.hold()
        harness.submit(1, "hello", max_tokens=3)
        made.append(harness)
        ready.set()
        harness.step()
        harness.engine.cancel(1)
        harness.step()

    owner = threading.Thread(target=own)
    owner.start()
    assert ready.wait(10)
    assert made[0].backend.entered.wait(10)
    made[0].engine.interrupt(1)
    owner.join(10)
    assert not owner.is_alive()
    assert made[0].result(1).error is None


def test_step_age_is_that_of_the_running_forward_and_0_between_steps(harness):
    ages: list[float] = []

    def during() -> None:
        harness.clock.advance(2.5)
        ages.append(harness.engine.step_age_s())

    harness.backend.during = during
    harness.submit(1, "hello", max_tokens=1)
    harness.run()
    assert ages == [2.5]
    assert harness.engine.step_age_s() == 0.0


# ---- what the fake backend would not accept ---------------------------------------------------------


def test_prefill_of_a_long_prompt_is_cut_into_chunks_of_the_batch(harness):
    harness.submit(1, "x" * 20, max_tokens=1)
    harness.run()
    assert [len(batch) for batch in harness.backend.batches] == [8, 8, 4]


def test_prefill_chunk_is_at_most_128_tokens_whatever_the_batch():
    harness = Harness(batch_tokens=512, context_length=1024)
    harness.submit(1, "x" * 300, max_tokens=1)
    harness.run()
    assert [len(batch) for batch in harness.backend.batches] == [128, 128, 44]


def test_vocabulary_with_eog_among_the_controls_stops_at_it():
    vocabulary = FakeVocabulary()
    harness = Harness(vocabulary=vocabulary)
    end = vocabulary.control("<|end|>")
    harness.submit(1, "hello", sampling=forced(end), stop=StopParams())
    harness.run()
    assert harness.result(1).cause == StopCause(eog_token=end)
