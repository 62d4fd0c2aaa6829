"""Inference requests from protobuf, checked; results to protobuf."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from google.protobuf import json_format

from ..errors import FeatureUnsupported, InvalidField
from ..models.entry import ModelEntry
from ..protocol import Delta, Finished, Started, Token
from ..types import (
    ChatInput,
    ChatTurn,
    GenerationInput,
    PromptInput,
    SamplingParams,
    StopCause,
    StopParams,
    Timings,
    TokensInput,
    Usage,
)
from ..v1 import inference_service_pb2 as pb
from .convert import Collector, enum_to_proto, overrides_from_proto, sampling_to_proto

MAX_TEXT_BYTES = 2**20
MAX_MESSAGES = 1024
MAX_TAG_BYTES = 64
MAX_N = 16
MAX_TOP_LOGPROBS = 20
# Templates write the role between control tokens: it must not be able to form one.
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_REQUEST_ID_BYTES = 128


class GenerateSpec(msgspec.Struct, frozen=True):
    """A checked request. `sampling` holds what was set; the model's values fill the rest."""

    model: str
    input: GenerationInput
    sampling: dict[str, Any]
    stop: StopParams
    want_tokens: bool
    queue_progress: bool
    load_if_needed: bool
    request_id: str

    def complete(self, entry: ModelEntry, seed: int) -> tuple[SamplingParams, StopParams]:
        """Sampling and stop values in force; `seed` is used if the request has none."""
        sampling = msgspec.structs.replace(entry.sampling(seed), **self.sampling)
        return sampling, msgspec.structs.replace(self.stop, default_max_tokens=entry.max_tokens)


def spec_from_proto(request: pb.GenerateRequest) -> GenerateSpec:
    """Raises InvalidField (every bad field named) or FeatureUnsupported."""
    wrong = Collector()
    if not request.model:
        wrong.add("model", "is required")
    for name, limit in {"client_tag": MAX_TAG_BYTES, "request_id": MAX_REQUEST_ID_BYTES}.items():
        if len(getattr(request, name).encode()) > limit:
            wrong.add(name, f"must be at most {limit} bytes")
    _check_numbers(request, wrong)
    stop = StopParams(
        max_tokens=request.stop.max_tokens if request.stop.HasField("max_tokens") else None,
        sequences=tuple(request.stop.sequences),
        token_ids=tuple(request.stop.token_ids),
        ignore_eos=request.stop.ignore_eos,
    )
    wrong.found += stop.violations()
    sampling: dict[str, Any] = wrong.take(lambda: overrides_from_proto(request.sampling), {})
    source: GenerationInput = TokensInput([])
    source = wrong.take(lambda: input_from_proto(request), source)
    wrong.raise_found()
    _refuse_unsupported(request)
    return GenerateSpec(
        model=request.model,
        input=source,
        sampling=sampling,
        stop=stop,
        want_tokens=request.output.token_ids,
        queue_progress=request.output.queue_progress,
        load_if_needed=request.load_if_needed if request.HasField("load_if_needed") else True,
        request_id=request.request_id,
    )


def _check_numbers(request: pb.GenerateRequest, wrong: Collector) -> None:
    """Limits of fields that are not used yet: a bad value is told even so."""
    limits = {
        "n": (request.n if request.HasField("n") else 1, 1, MAX_N),
        "stop.min_tokens": (request.stop.min_tokens, 0, 2**31 - 1),
        "output.top_logprobs": (request.output.top_logprobs, 0, MAX_TOP_LOGPROBS),
    }
    for field, (value, low, high) in limits.items():
        if not low <= value <= high:
            wrong.add(field, f"must be {low} to {high}, is {value}")
    for field, kind in {"priority": pb.Priority, "overflow_policy": pb.OverflowPolicy}.items():
        if getattr(request, field) not in kind.values():
            wrong.add(field, f"must be a named value, is {getattr(request, field)}")


def _refuse_unsupported(request: pb.GenerateRequest) -> None:
    """What the contract has and this server does not do yet: never ignored."""
    output = request.output
    asked = {
        "constraint": request.HasField("constraint"),
        "n above 1": request.n > 1,
        "priority": request.priority not in (pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_NORMAL),
        "overflow_policy other than ERROR": request.overflow_policy > pb.OVERFLOW_POLICY_ERROR,
        "keep_alive": request.HasField("keep_alive"),
        "stop.min_tokens": request.stop.min_tokens > 0,
        "output.logprobs": output.logprobs or output.top_logprobs > 0,
        "output.prefill_progress": output.prefill_progress,
        "output.echo": output.echo,
    }
    for feature, wanted in asked.items():
        if wanted:
            raise FeatureUnsupported(feature)


def input_from_proto(
    request: pb.GenerateRequest | pb.TokenizeRequest | pb.CountTokensRequest,
) -> GenerationInput:
    """The `oneof input` of a request. Raises InvalidField."""
    which = request.WhichOneof("input")
    match which:
        case "prompt" | "text":
            text = getattr(request, which)
            _check_text(which, len(text.encode()))
            if not isinstance(request, pb.TokenizeRequest):
                return PromptInput(text)
            add_special = request.add_special if request.HasField("add_special") else True
            return PromptInput(text, add_special, request.parse_special)
        case "token_ids":
            ids = list(request.token_ids.ids)  # type: ignore[union-attr]
            if not ids:
                raise InvalidField("token_ids.ids", "must hold at least one id")
            return TokensInput(ids)
        case "chat":
            return _chat_from_proto(request.chat)
    one_of = "text, chat" if isinstance(request, pb.TokenizeRequest) else "prompt, token_ids, chat"
    raise InvalidField("input", f"one of {one_of} is required")


def _chat_from_proto(chat: pb.ChatInput) -> ChatInput:
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise InvalidField("chat.messages", f"must hold 1 to {MAX_MESSAGES}, has {len(chat.messages)}")
    wrong = Collector()
    turns, size = [], 0
    for place, message in enumerate(chat.messages):
        if not _ROLE.fullmatch(message.role):
            wrong.add(f"chat.messages[{place}].role", f"must match {_ROLE.pattern}")
        for part_place, part in enumerate(message.content):
            if part.WhichOneof("part") != "text":
                wrong.add(f"chat.messages[{place}].content[{part_place}]", "text is required")
        text = "".join(part.text for part in message.content)
        size += len(text.encode())
        turns.append(ChatTurn(message.role, text))
    wrong.take(lambda: _check_text("chat.messages", size), None)
    wrong.raise_found()
    return ChatInput(
        turns,
        chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        json_format.MessageToDict(chat.template_kwargs),
    )


def _check_text(field: str, size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise InvalidField(field, f"must be at most {MAX_TEXT_BYTES} bytes, is {size}")


def started_to_proto(event: Started, entry: ModelEntry, sampling: SamplingParams) -> pb.Started:
    return pb.Started(
        model=entry.name,
        sha256=entry.sha256,
        prompt_token_count=event.prompt_tokens,
        cached_token_count=event.cached_tokens,
        sampling=sampling_to_proto(sampling),
        max_tokens=event.max_tokens,
    )


def tokens_to_proto(tokens: list[Token]) -> list[pb.Token]:
    return [pb.Token(id=token.id, piece=token.piece) for token in tokens]


def delta_to_proto(event: Delta) -> pb.Delta:
    return pb.Delta(text=event.text, tokens=tokens_to_proto(event.tokens))


def completed_to_proto(event: Finished) -> pb.Completed:
    return pb.Completed(
        finish_reason=enum_to_proto(event.reason, pb.FinishReason, "FINISH_REASON"),
        stop_cause=stop_cause_to_proto(event.cause),
        usage=usage_to_proto(event.usage),
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
    )
