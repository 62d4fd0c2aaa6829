"""A call that has ended as spans of OpenTelemetry: the RPC, and the phases of its generation."""

from __future__ import annotations

import dataclasses
import time

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..access.caller import tenant_of
from ..rpc.call import Call
from ..rpc.status import SERVER_FAULTS, number_of

Attributes = dict[str, str | int | float | bool | list[str]]
# Of what the server is asked for, only these are traced: probes would drown the rest.
TRACED = "/bear_grpc.v1."
PROVIDER = "bear_grpc"
LOAD_S = 0.001  # a model that was ready sooner has not been waited for


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """A part of a generation; times are CLOCK_MONOTONIC seconds."""

    name: str
    began_s: float
    ended_s: float
    attributes: Attributes


class SpanWriter:
    """Makes the spans of a call when it has ended: while it runs nothing is done for them."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("bear_grpc")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, call: Call) -> None:
        """Nothing: a call knows when it began."""

    def end(self, call: Call) -> None:
        """Writes the call's spans, if its trace is sampled."""
        if not call.method.startswith(TRACED):
            return
        zero_s = time.time() - time.monotonic()  # one for all: phases stay in order

        def at(seconds: float) -> int:
            return round((zero_s + seconds) * 1e9)

        span = self._tracer.start_span(
            call.method[1:],
            context=self._parent_of(call),
            kind=SpanKind.SERVER,
            attributes=attributes_of(call),
            start_time=at(call.began_s),
        )
        if span.is_recording():
            if call.code in SERVER_FAULTS:
                span.set_status(Status(StatusCode.ERROR, call.reason or call.code))
            for seconds in call.restarts_s:
                span.add_event("worker died", timestamp=at(seconds))
            inside = set_span_in_context(span)
            for phase in phases_of(call):
                self._tracer.start_span(
                    phase.name, inside, attributes=phase.attributes, start_time=at(phase.began_s)
                ).end(at(phase.ended_s))
        span.end(at(call.ended_s))

    def _parent_of(self, call: Call) -> Context:
        """The caller's span as the W3C headers tell it; headers that are wrong count as none."""
        names = ("traceparent", "tracestate")
        told = {name: value for name in names if isinstance(value := call.metadata.get(name), str)}
        return self._propagator.extract(told, Context())  # never what this thread happens to have


def attributes_of(call: Call) -> Attributes:
    """What the semantic conventions for RPC and for generative AI say of a call."""
    service, _, method = call.method[1:].rpartition("/")
    found: Attributes = {
        "rpc.system": "grpc",
        "rpc.system.name": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "rpc.grpc.status_code": number_of(call.code),
        "rpc.response.status_code": call.code,
        "network.peer.address": tenant_of(call.peer).partition(":")[2] or call.peer,
    }
    if call.code != "OK":
        found["error.type"] = call.reason or call.code
    if call.caller.id:
        found["user.id"] = call.caller.id
    if not call.model:
        return found
    found["gen_ai.request.model"] = call.model
    if not call.operation:
        return found
    found |= {
        "gen_ai.operation.name": call.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.usage.input_tokens": call.usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": call.usage.cached_tokens,
        "gen_ai.usage.output_tokens": call.drawn_tokens,
    }
    if call.request_id:
        found["gen_ai.response.id"] = call.request_id
    if call.ready_s:
        found["gen_ai.response.model"] = call.model
    if call.finish_reasons:
        found["gen_ai.response.finish_reasons"] = [reason.value for reason in call.finish_reasons]
    if call.timings is not None and call.timings.ttft_s:
        found["gen_ai.response.time_to_first_chunk"] = call.timings.ttft_s
    return found


def phases_of(call: Call) -> list[Phase]:
    """Load, queue, prefill and decode, one after the other, as far as they are known.

    Of several answers those of the last to end. A call that was cut off has no timings: what is known is
    until when it waited.
    """
    if not call.operation:
        return []
    named: Attributes = {"gen_ai.operation.name": call.operation, "gen_ai.request.model": call.model}
    phases: list[Phase] = []
    waits_s = call.began_s
    loaded_s = call.ready_s or call.ended_s  # a call that got no model waited for one to its end
    if loaded_s - call.began_s >= LOAD_S:
        phases.append(Phase("load", call.began_s, loaded_s, named))
        waits_s = loaded_s
    if not call.ready_s:
        return phases
    if call.timings is None:
        until_s = call.started_s or call.ended_s
        return [*phases, Phase("queue", waits_s, max(waits_s, until_s), named)]
    times, usage = call.timings, call.usage
    taken_s = max(waits_s, call.began_s + times.queue_s)
    first_s = taken_s + times.prefill_s
    return [
        *phases,
        Phase("queue", waits_s, taken_s, named),
        Phase(
            "prefill",
            taken_s,
            first_s,
            named
            | {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            },
        ),
        Phase(
            "decode",
            first_s,
            first_s + times.decode_s,
            named
            | {
                "gen_ai.usage.output_tokens": call.drawn_tokens,
                "bear_grpc.sampling.duration": times.sampling_s,
                "bear_grpc.preemption.count": times.preemptions,
            },
        ),
    ]
