"""Events of a generation as messages: every value arrives, and unset stays unset."""

from __future__ import annotations

from pathlib import Path

import pytest

from bear_grpc.models.entry import ModelEntry
from bear_grpc.params import SamplingParams
from bear_grpc.protocol import Delta, Finished, Prefilled, Queued, Started, Token, TopToken
from bear_grpc.rpc import events
from bear_grpc.rpc.whole import Whole
from bear_grpc.types import FinishReason, StopCause, Timings, Usage
from bear_grpc.v1 import inference_service_pb2 as pb

ENTRY = ModelEntry("bear", Path("b"), True)
NO_TIMES = Timings(0, 0, 0, 0)


def response(index: int, event: object) -> pb.GenerateResponse | None:
    return events.response_to_proto("r", index, event, ENTRY, SamplingParams(seed=2**32 - 1))


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (Started(1, 10, 4, 20), "started"),
        (Prefilled(1, 3, 9), "prefill_progress"),
        (Queued(1, 2, 0.5), "queued"),
        (Delta(1, "a", 1), "delta"),
        (Delta(1, "", 1, [Token(5, b"a")]), "delta"),
        (Finished(1, FinishReason.LENGTH, None, Usage(1, 0, 1), NO_TIMES), "completed"),
    ],
)
def test_response_has_the_index_and_one_event(event, kind):
    message = response(3, event)
    assert (message.index, message.WhichOneof("event")) == (3, kind)


def test_response_of_a_delta_without_text_and_tokens_is_none():
    assert response(0, Delta(1, "", 1)) is None


def test_response_of_prefill_progress_has_both_counts():
    progress = response(0, Prefilled(1, 3, 9)).prefill_progress
    assert (progress.completed_token_count, progress.total_token_count) == (3, 9)


def test_response_of_a_place_in_the_queue_has_position_and_wait():
    assert response(0, Queued(1, 2, 0.5)).queued == pb.Queued(position=2, estimated_wait_seconds=0.5)


def test_started_tells_the_seed_of_its_own_answer():
    assert response(0, Started(1, 10, 4, 20)).started.sampling.seed == 2**32 - 1
    assert response(2, Started(1, 10, 4, 20)).started.sampling.seed == 1


def test_token_with_logprobs_has_them_and_one_without_has_none():
    token = Token(5, b"a", -0.5, [TopToken(6, b"\xff", 0.0)])
    message = events.token_to_proto(token)
    assert message == pb.Token(
        id=5, piece=b"a", logprob=-0.5, top=[pb.TopToken(id=6, piece=b"\xff", logprob=0)]
    )
    assert events.token_to_proto(Token(5, b"a", 0.0)).HasField("logprob")
    assert not events.token_to_proto(Token(5, b"a")).HasField("logprob")


def test_completed_counts_the_prompt_in_answer_0_only():
    event = Finished(1, FinishReason.LENGTH, None, Usage(10, 4, 3), NO_TIMES)
    first, second = (events.completed_to_proto(index, event).usage for index in (0, 1))
    assert first == pb.Usage(prompt_token_count=10, cached_token_count=4, completion_token_count=3)
    assert second == pb.Usage(completion_token_count=3)


@pytest.mark.parametrize("satisfied", [True, False, None])
def test_completed_tells_of_the_constraint_only_with_one(satisfied):
    event = Finished(1, FinishReason.LENGTH, None, Usage(1, 0, 1), NO_TIMES, satisfied)
    message = events.completed_to_proto(0, event)
    assert message.HasField("constraint_satisfied") is (satisfied is not None)
    assert message.constraint_satisfied is bool(satisfied)


def test_timings_have_the_time_of_sampling_and_the_preemptions():
    timings = Timings(1, 2, 4, 8, sampling_s=0.25, preemptions=3)
    message = events.timings_to_proto(Finished(1, FinishReason.LENGTH, None, Usage(1, 0, 1), timings))
    assert (message.sampling_seconds, message.preemption_count) == (0.25, 3)


async def test_whole_has_every_answer_by_index_and_the_prompt_once():
    whole = Whole(2)
    for index, event in [
        (1, Started(1, 10, 4, 20)),
        (0, Started(0, 10, 4, 20)),
        (1, Delta(1, "b", 1, [Token(5, b"b")])),
        (0, Prefilled(0, 10, 10)),
        (0, Delta(0, "a", 1)),
        (1, Delta(1, "c", 1)),
        (1, Finished(1, FinishReason.STOP, StopCause(token_id=7), Usage(10, 4, 3), Timings(0, 0, 0, 1))),
        (0, Finished(0, FinishReason.LENGTH, None, Usage(10, 4, 2), Timings(0, 0, 0, 2))),
    ]:
        await whole.add(response(index, event))
    answer = whole.response()
    assert answer.request_id == "r"
    assert answer.started.sampling.seed == 2**32 - 1
    assert [(choice.index, choice.text, len(choice.tokens)) for choice in answer.choices] == [
        (0, "a", 0),
        (1, "bc", 1),
    ]
    assert [choice.finish_reason for choice in answer.choices] == [
        pb.FINISH_REASON_LENGTH,
        pb.FINISH_REASON_STOP,
    ]
    assert [choice.timings.total_seconds for choice in answer.choices] == [2, 1]
    assert answer.choices[1].stop_cause.token_id == 7
    assert not answer.choices[0].HasField("stop_cause")
    assert answer.usage == pb.Usage(prompt_token_count=10, cached_token_count=4, completion_token_count=5)


def test_delta_carries_text_and_bytes_that_are_no_text():
    message = response(0, Delta(1, "a", 1, [Token(5, b"\xff")])).delta
    assert message == pb.Delta(text="a", tokens=[pb.Token(id=5, piece=b"\xff")])


def test_started_tells_what_is_in_force():
    entry = ModelEntry("bear", Path("b"), True, sha256="ab")
    message = events.started_to_proto(0, Started(1, 10, 4, 20, 6), entry, SamplingParams(seed=3))
    assert (message.model, message.sha256, message.max_tokens) == ("bear", "ab", 20)
    assert message.truncated_token_count == 6
    assert (message.prompt_token_count, message.cached_token_count) == (10, 4)
    assert message.sampling.seed == 3


@pytest.mark.parametrize(
    ("cause", "which"),
    [
        (StopCause(eog_token=0), "eog_token"),
        (StopCause(sequence="x"), "sequence"),
        (StopCause(token_id=0), "token_id"),
    ],
)
def test_completed_names_the_cause_even_if_it_is_0(cause, which):
    event = Finished(1, FinishReason.STOP, cause, Usage(1, 0, 1), Timings(0, 0, 0, 0))
    message = events.completed_to_proto(0, event)
    assert message.finish_reason == pb.FINISH_REASON_STOP
    assert message.stop_cause.WhichOneof("kind") == which


def test_completed_without_cause_has_none():
    event = Finished(1, FinishReason.LENGTH, None, Usage(1, 0, 1), Timings(0, 0, 0, 0))
    assert not events.completed_to_proto(0, event).HasField("stop_cause")


def test_timings_rates_leave_out_cached_tokens_and_the_first_token():
    timings = Timings(queue_s=1, prefill_s=2, decode_s=4, total_s=8, ttft_s=3)
    event = Finished(1, FinishReason.LENGTH, None, Usage(100, 40, 9), timings)
    message = events.timings_to_proto(event)
    assert (message.prefill_tokens_per_second, message.decode_tokens_per_second) == (30, 2)


def test_timings_of_no_time_have_rates_of_0():
    event = Finished(1, FinishReason.LENGTH, None, Usage(100, 0, 1), Timings(0, 0, 0, 0))
    message = events.timings_to_proto(event)
    assert (message.prefill_tokens_per_second, message.decode_tokens_per_second) == (0, 0)
