"""What is known of the call that a task works for."""

from __future__ import annotations

import contextvars
import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ..access.caller import Caller, tenant_of
from ..params import GenerationInput
from ..protocol import Delta, Finished, Prefilled, Queued, Started
from ..types import FinishReason, Timings, Usage

ANONYMOUS, NOTHING = Caller(), Usage(0, 0, 0)
# A message that waits so long waits for its reader.
STALL_S = 0.01


class Transcript(Protocol):
    """Keeps what was asked and answered, as far as it wants to."""

    def ask(self, source: GenerationInput) -> None:
        """The input of the call's generation."""

    def answer(self, id: int, text: str) -> None:
        """A piece of text of one of its answers."""


@dataclasses.dataclass(slots=True)
class Call:
    """One call. Servicers fill in what they come to know; `code` and `ended_s` are set at its end.

    `began_s` and `ended_s` are CLOCK_MONOTONIC. `method` is `/package.Service/Method`; `code` a name like
    `NOT_FOUND`, `reason` that of our ErrorInfo. Of a generation: `usage` counts the prompt once and what
    all answers drew, `timings` are those of the last to end. Its model was ready at `ready_s`, a worker
    took it up at `started_s` (0: never), workers died under it at `restarts_s`. `operation` is what
    OpenTelemetry calls it. Messages waited for the client's window for `stalled_s`. An observer's
    `on_delta` is called with the number of tokens of each piece of text; its `transcript` gets the input
    and the text. `on_tokens` is called with the tokens of the prompt, once, and of each piece. Of an audited
    method `subjects` are the models that the request names.

    `is_known`: nothing was missing of who calls, and `is_admitted`: it was let in; neither is taken back when
    the call is ended because its key has become invalid.
    """

    method: str
    metadata: dict[str, str | bytes] = dataclasses.field(default_factory=dict, repr=False)
    peer: str = ""
    caller: Caller = ANONYMOUS
    is_known: bool = False
    is_admitted: bool = False
    began_s: float = 0.0
    ended_s: float = 0.0
    code: str = ""
    reason: str = ""
    model: str = ""
    subjects: tuple[str, ...] = ()
    request_id: str = ""
    usage: Usage = NOTHING
    timings: Timings | None = None
    finish_reasons: list[FinishReason] = dataclasses.field(default_factory=list)
    operation: str = ""
    ready_s: float = 0.0
    started_s: float = 0.0
    restarts_s: list[float] = dataclasses.field(default_factory=list)
    stalled_s: float = 0.0
    transcript: Transcript | None = dataclasses.field(default=None, repr=False)
    on_delta: Callable[[int], None] | None = dataclasses.field(default=None, repr=False)
    on_tokens: Callable[[int], None] | None = dataclasses.field(default=None, repr=False)
    told_tokens: int = 0

    @property
    def drawn_tokens(self) -> int:
        """Tokens of all answers, those included that did not come to their end."""
        return max(self.told_tokens, self.usage.completion_tokens)


_CALL: contextvars.ContextVar[Call] = contextvars.ContextVar("call")


def set_current(call: Call) -> None:
    """This task, and those that it starts, work for the call."""
    _CALL.set(call)


def current_call(context: Any) -> Call:
    """The call that this task works for; outside of the interceptor a new one of an anonymous caller."""
    call = _CALL.get(None)
    if call is None:
        call = Call("")
        identify(call, context)
    return call


def identify(call: Call, context: Any) -> None:
    """Sets what the context tells: the peer, who is anonymous until somebody knows better."""
    call.began_s = time.monotonic()
    call.peer = context.peer()
    call.caller = Caller(tenant=tenant_of(call.peer))


def may_know(model: str) -> bool:
    """Whether the caller of this task's call may know of the model."""
    call = _CALL.get(None)
    return call is None or call.caller.may_use(model)


def id_of_request() -> str:
    """The id of this task's request; of one that has none, made now for its line in the log."""
    call = _CALL.get(None)
    if call is None:
        return uuid.uuid4().hex
    call.request_id = call.request_id or uuid.uuid4().hex
    return call.request_id


def note_error(reason: str) -> None:
    """The call of this task ends with an error of this reason."""
    call = _CALL.get(None)
    if call is not None:
        call.reason = reason


def note_write(seconds: float) -> None:
    """Sending a message of this task's call took so long."""
    call = _CALL.get(None) if seconds >= STALL_S else None
    if call is not None:
        call.stalled_s += seconds


def note(call: Call, event: Queued | Started | Prefilled | Delta | Finished) -> None:
    """An event of the call's generation."""
    match event:
        case Delta():
            call.told_tokens += event.count
            if call.on_tokens is not None:
                call.on_tokens(event.count)
            if call.on_delta is not None:
                call.on_delta(event.count)
            if call.transcript is not None:
                call.transcript.answer(event.id, event.text)
        case Started():
            call.started_s = call.started_s or time.monotonic()
            if not call.usage.prompt_tokens:  # all answers have one prompt, which is read once
                call.usage = Usage(event.prompt_tokens, event.cached_tokens, 0)
                if call.on_tokens is not None:
                    call.on_tokens(event.prompt_tokens)
        case Finished():
            drawn = call.usage.completion_tokens + event.usage.completion_tokens
            call.usage = msgspec.structs.replace(call.usage, completion_tokens=drawn)
            call.timings = event.timings
            call.finish_reasons.append(event.reason)
