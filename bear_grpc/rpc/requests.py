"""Inference requests from protobuf, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from google.protobuf import json_format

from ..errors import InvalidField
from ..input_limits import DEFAULT_LIMITS, InputLimits
from ..models.entry import ModelEntry
from ..params import (
    ChatInput,
    ChatTurn,
    Constraint,
    GenerationInput,
    OutputParams,
    OverflowPolicy,
    Priority,
    PromptInput,
    SamplingParams,
    StopParams,
    TokensInput,
)
from ..v1 import inference_service_pb2 as pb
from .constraint import constraint_from_proto
from .convert import Collector, enum_from_proto, overrides_from_proto

MAX_TAG_BYTES = 64
# Templates write the role between control tokens: it must not be able to form one.
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_REQUEST_ID_BYTES = 128


class GenerateSpec(msgspec.Struct, frozen=True):
    """A checked request. `sampling` holds what was set; the model's values fill the rest."""

    model: str
    input: GenerationInput
    sampling: dict[str, Any] = {}
    stop: StopParams = StopParams()
    n: int = 1
    output: OutputParams = OutputParams()
    constraint: Constraint | None = None
    overflow: OverflowPolicy = OverflowPolicy.ERROR
    load_if_needed: bool = True
    keep_alive_s: float | None = None
    request_id: str = ""
    fail_on_restart: bool = False
    tag: str = ""
    priority: Priority = Priority.NORMAL

    def complete(self, entry: ModelEntry, seed: int) -> tuple[SamplingParams, StopParams]:
        """Sampling and stop values in force; `seed` is used if the request has none."""
        sampling = msgspec.structs.replace(entry.sampling(seed), **self.sampling)
        return sampling, msgspec.structs.replace(self.stop, default_max_tokens=entry.max_tokens)


def spec_from_proto(
    request: pb.GenerateRequest, limits: InputLimits = DEFAULT_LIMITS, cap: Priority = Priority.HIGH
) -> GenerateSpec:
    """`cap` is the most urgent that the caller may be. Raises InvalidField, every bad field named."""
    wrong = Collector()
    if not request.model:
        wrong.add("model", "is required")
    for name, limit in {"client_tag": MAX_TAG_BYTES, "request_id": MAX_REQUEST_ID_BYTES}.items():
        if len(getattr(request, name).encode()) > limit:
            wrong.add(name, f"must be at most {limit} bytes")
    n = request.n if request.HasField("n") else 1
    if not 1 <= n <= limits.max_answers:
        wrong.add("n", f"must be 1 to {limits.max_answers}, is {n}")
    stop = StopParams(
        max_tokens=request.stop.max_tokens if request.stop.HasField("max_tokens") else None,
        sequences=tuple(request.stop.sequences),
        token_ids=tuple(request.stop.token_ids),
        ignore_eos=request.stop.ignore_eos,
        min_tokens=request.stop.min_tokens,
    )
    wrong.found += stop.violations(limits=limits)
    sampling: dict[str, Any] = wrong.take(lambda: overrides_from_proto(request.sampling, limits), {})
    constraint = wrong.take(lambda: constraint_from_proto(request, limits), None)
    source: GenerationInput = TokensInput([])
    source = wrong.take(lambda: input_from_proto(request, limits), source)
    spec = GenerateSpec(
        model=request.model,
        input=source,
        sampling=sampling,
        stop=stop,
        n=n,
        output=_output(request.output, wrong, limits),
        constraint=constraint,
        overflow=wrong.take(lambda: _overflow(request.overflow_policy), OverflowPolicy.ERROR),
        load_if_needed=request.load_if_needed if request.HasField("load_if_needed") else True,
        keep_alive_s=request.keep_alive.ToNanoseconds() / 1e9 if request.HasField("keep_alive") else None,
        request_id=request.request_id,
        fail_on_restart=request.fail_on_restart,
        tag=request.client_tag,
        priority=wrong.take(lambda: _priority(request.priority, cap), Priority.NORMAL),
    )
    wrong.raise_found()
    return spec


def _output(options: pb.OutputOptions, wrong: Collector, limits: InputLimits) -> OutputParams:
    most = limits.max_top_logprobs
    if not 0 <= options.top_logprobs <= most:
        wrong.add("output.top_logprobs", f"must be 0 to {most}, is {options.top_logprobs}")
    return OutputParams(
        tokens=options.token_ids,
        logprobs=options.logprobs,
        top_logprobs=options.top_logprobs,
        echo=options.echo,
        prefill_progress=options.prefill_progress,
        queue_progress=options.queue_progress,
    )


def _overflow(number: int) -> OverflowPolicy:
    if number == pb.OVERFLOW_POLICY_UNSPECIFIED:
        return OverflowPolicy.ERROR
    return enum_from_proto(number, pb.OverflowPolicy, "OVERFLOW_POLICY", OverflowPolicy, "overflow_policy")


def _priority(number: int, cap: Priority) -> Priority:
    if number == pb.PRIORITY_UNSPECIFIED:
        return max(Priority.NORMAL, cap)
    priority = enum_from_proto(number, pb.Priority, "PRIORITY", Priority, "priority")
    if priority < cap:  # never lowered without a word
        raise InvalidField("priority", f"must be at most {cap.name} with this key, is {priority.name}")
    return priority


def input_from_proto(
    request: pb.GenerateRequest | pb.TokenizeRequest | pb.CountTokensRequest,
    limits: InputLimits = DEFAULT_LIMITS,
) -> GenerationInput:
    """The `oneof input` of a request. Raises InvalidField."""
    which = request.WhichOneof("input")
    match which:
        case "prompt" | "text":
            text = getattr(request, which)
            _check_text(which, [text], limits)
            if not isinstance(request, pb.TokenizeRequest):
                return PromptInput(text)
            add_special = request.add_special if request.HasField("add_special") else True
            return PromptInput(text, add_special, request.parse_special)
        case "token_ids":
            ids = list(request.token_ids.ids)  # type: ignore[union-attr]
            if not ids:
                raise InvalidField("token_ids.ids", "must hold at least one id")
            check_token_ids("token_ids.ids", ids, limits)
            return TokensInput(ids)
        case "chat":
            return _chat_from_proto(request.chat, limits)
    one_of = "text, chat" if isinstance(request, pb.TokenizeRequest) else "prompt, token_ids, chat"
    raise InvalidField("input", f"one of {one_of} is required")


def _chat_from_proto(chat: pb.ChatInput, limits: InputLimits) -> ChatInput:
    most = limits.max_messages
    if not 1 <= len(chat.messages) <= most:
        raise InvalidField("chat.messages", f"must hold 1 to {most}, has {len(chat.messages)}")
    wrong = Collector()
    turns = []
    for place, message in enumerate(chat.messages):
        if not _ROLE.fullmatch(message.role):
            wrong.add(f"chat.messages[{place}].role", f"must match {_ROLE.pattern}")
        for part_place, part in enumerate(message.content):
            if part.WhichOneof("part") != "text":
                wrong.add(f"chat.messages[{place}].content[{part_place}]", "text is required")
        text = "".join(part.text for part in message.content)
        turns.append(ChatTurn(message.role, text))
    wrong.take(lambda: _check_text("chat.messages", [turn.content for turn in turns], limits), None)
    wrong.raise_found()
    return ChatInput(
        turns,
        chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        json_format.MessageToDict(chat.template_kwargs),
    )


def check_token_ids(field: str, ids: Sequence[int], limits: InputLimits) -> None:
    """Raises InvalidField if there are too many. Which ids there are is the model's."""
    if len(ids) > limits.max_token_ids:
        raise InvalidField(field, f"must hold at most {limits.max_token_ids}, has {len(ids)}")


def _check_text(field: str, texts: Sequence[str], limits: InputLimits) -> None:
    data = [text.encode() for text in texts]
    size = sum(map(len, data))
    if size > limits.max_text_bytes:
        raise InvalidField(field, f"must be at most {limits.max_text_bytes} bytes, is {size}")
    most = limits.max_unbroken_bytes
    longest = max((len(run) for each in data if len(each) > most for run in each.split()), default=0)
    if longest > most:
        raise InvalidField(field, f"must have white space at least every {most} bytes, has none in {longest}")
