"""The events of a generation to protobuf."""

from __future__ import annotations

import msgspec

from ..executor.journal import Event
from ..models.entry import ModelEntry
from ..params import MAX_SEED, SamplingParams
from ..protocol import Delta, Finished, Prefilled, Queued, Started, Token
from ..types import StopCause, Timings, Usage
from ..v1 import inference_service_pb2 as pb
from .convert import enum_to_proto, sampling_to_proto


def response_to_proto(
    request_id: str, index: int, event: Event, entry: ModelEntry, sampling: SamplingParams
) -> pb.GenerateResponse | None:
    """The message of an event of answer `index`; None if it has nothing to tell.

    `sampling` is the request's, with the seed of answer 0.
    """
    match event:
        case Delta():
            if not event.text and not event.tokens:
                return None  # half a character, or held back for a stop sequence
            response = pb.GenerateResponse()
            # Filled in place: one that is handed over is copied, for every token.
            response.delta.text = event.text
            if event.tokens:
                response.delta.tokens.extend(token_to_proto(token) for token in event.tokens)
        case Queued():
            place = pb.Queued(position=event.position, estimated_wait_seconds=event.estimated_wait_s)
            response = pb.GenerateResponse(queued=place)
        case Started():
            response = pb.GenerateResponse(started=started_to_proto(index, event, entry, sampling))
        case Prefilled():
            progress = pb.PrefillProgress(completed_token_count=event.done, total_token_count=event.total)
            response = pb.GenerateResponse(prefill_progress=progress)
        case Finished():
            response = pb.GenerateResponse(completed=completed_to_proto(index, event))
    response.request_id = request_id
    response.index = index
    return response


def started_to_proto(index: int, event: Started, entry: ModelEntry, sampling: SamplingParams) -> pb.Started:
    seed = (sampling.seed + index) % (MAX_SEED + 1)
    return pb.Started(
        model=entry.name,
        sha256=entry.sha256,
        prompt_token_count=event.prompt_tokens,
        cached_token_count=event.cached_tokens,
        sampling=sampling_to_proto(msgspec.structs.replace(sampling, seed=seed)),
        truncated_token_count=event.truncated_tokens,
        max_tokens=event.max_tokens,
    )


def token_to_proto(token: Token) -> pb.Token:
    top = [pb.TopToken(id=other.id, piece=other.piece, logprob=other.logprob) for other in token.top]
    return pb.Token(id=token.id, piece=token.piece, logprob=token.logprob, top=top)


def completed_to_proto(index: int, event: Finished) -> pb.Completed:
    # The answers have one prompt: it is counted once.
    own = msgspec.structs.replace(event.usage, prompt_tokens=0, cached_tokens=0)
    return pb.Completed(
        finish_reason=enum_to_proto(event.reason, pb.FinishReason, "FINISH_REASON"),
        stop_cause=stop_cause_to_proto(event.cause),
        constraint_satisfied=event.satisfied,
        usage=usage_to_proto(own if index else event.usage),
        timings=timings_to_proto(event),
    )


def stop_cause_to_proto(cause: StopCause | None) -> pb.StopCause | None:
    if cause is None:
        return None
    values = {name: value for name, value in msgspec.structs.asdict(cause).items() if value is not None}
    return pb.StopCause(**values)


def usage_to_proto(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_token_count=usage.prompt_tokens,
        cached_token_count=usage.cached_tokens,
        completion_token_count=usage.completion_tokens,
    )


def timings_to_proto(event: Finished) -> pb.Timings:
    timings: Timings = event.timings
    computed = event.usage.prompt_tokens - event.usage.cached_tokens
    later = event.usage.completion_tokens - 1
    return pb.Timings(
        queue_seconds=timings.queue_s,
        prefill_seconds=timings.prefill_s,
        ttft_seconds=timings.ttft_s,
        decode_seconds=timings.decode_s,
        total_seconds=timings.total_s,
        prefill_tokens_per_second=computed / timings.prefill_s if timings.prefill_s > 0 else 0.0,
        decode_tokens_per_second=later / timings.decode_s if timings.decode_s > 0 and later > 0 else 0.0,
        sampling_seconds=timings.sampling_s,
        preemption_count=timings.preemptions,
    )
