"""One line for each call, at its end. What was asked and answered is told only where a setting says so."""

from __future__ import annotations

import logging
from typing import Any

from ..params import ChatInput, GenerationInput, PromptInput
from ..rpc.call import Call
from .call_metrics import GENERATIONS, service_and_method

log = logging.getLogger("bear_grpc.requests")

# Codes that tell of a fault of the server's.
FAULTS = frozenset(("UNKNOWN", "INTERNAL", "DATA_LOSS"))
# Asked every few seconds by whoever watches the server.
PROBES = "grpc.health.v1.Health"
# Of names that a client has chosen, and of prompts and answers each.
MAX_NAME, MAX_TEXT = 128, 4096
MAX_TOKENS = 512


class RequestLog:
    """A CallObserver."""

    def __init__(self, *, with_prompts: bool = False) -> None:
        """`with_prompts` is whether texts are logged."""
        self._with_prompts = with_prompts

    def begin(self, call: Call) -> None:
        """Nothing is logged yet."""
        if self._with_prompts and service_and_method(call)[1] in GENERATIONS:
            call.transcript = Kept()

    def end(self, call: Call) -> None:
        """Logs it."""
        service, method = service_and_method(call)
        level = logging.WARNING if call.code in FAULTS else logging.INFO
        if service == PROBES and level == logging.INFO:
            level = logging.DEBUG
        if log.isEnabledFor(level):
            what = " ".join(filter(None, (method, call.code, call.reason)))
            log.log(level, "%s", what, extra={"fields": fields_of(call)})


def fields_of(call: Call) -> dict[str, Any]:
    """What the line tells; of what is not known nothing. Seconds are rounded to microseconds."""
    fields: dict[str, Any] = {
        "method": call.method,
        "id": _cut(call.request_id),
        "key": call.caller.id,
        "tenant": call.caller.tenant,
        "peer": call.peer,
        "model": _cut(call.model),
        "code": call.code,
        "reason": call.reason,
    }
    if call.usage.prompt_tokens:
        fields["prompt_tokens"] = call.usage.prompt_tokens
        fields["cached_tokens"] = call.usage.cached_tokens
        fields["completion_tokens"] = call.drawn_tokens
    if call.timings is not None:
        fields["queue_s"] = round(call.timings.queue_s, 6)
        fields["ttft_s"] = round(call.timings.ttft_s, 6)
    fields["total_s"] = round(call.ended_s - call.began_s, 6)
    fields["finish"] = [reason.value for reason in call.finish_reasons]
    if isinstance(call.transcript, Kept):
        fields["prompt"] = call.transcript.prompt
        fields["answers"] = call.transcript.answers
    return {name: value for name, value in fields.items() if value not in ("", [])}


class Kept:
    """The beginning of a call's input and of each of its answers."""

    def __init__(self) -> None:
        self.prompt = ""
        self._answers: dict[int, list[str]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def answers(self) -> list[str]:
        """In their order."""
        return ["".join(parts) for _, parts in sorted(self._answers.items())]

    def ask(self, source: GenerationInput) -> None:
        """The input; of a chat its messages, each after its role, of tokens their ids."""
        match source:
            case PromptInput():
                self.prompt = source.text[:MAX_TEXT]
            case ChatInput():
                turns = (f"{turn.role}: {turn.content[:MAX_TEXT]}" for turn in source.messages[:MAX_TEXT])
                self.prompt = "\n".join(turns)[:MAX_TEXT]
            case _:
                self.prompt = " ".join(map(str, source.ids[:MAX_TOKENS]))

    def answer(self, id: int, text: str) -> None:
        """A piece of an answer."""
        length = self._lengths.get(id, 0)
        if length < MAX_TEXT:
            self._answers.setdefault(id, []).append(text[: MAX_TEXT - length])
            self._lengths[id] = length + len(text)


def _cut(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."
