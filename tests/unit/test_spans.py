"""A call as spans: which phases there are, and when."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from bear_grpc.access.caller import Caller
from bear_grpc.rpc.call import Call
from bear_grpc.telemetry.spans import SpanWriter, attributes_of, phases_of
from bear_grpc.types import Timings, Usage

GENERATE = "/bear_grpc.v1.InferenceService/Generate"
TIMES = Timings(queue_s=1.0, prefill_s=2.0, decode_s=4.0, total_s=7.0, ttft_s=3.5, preemptions=2)


def call(**values: object) -> Call:
    known = {"began_s": 100.0, "ended_s": 110.0, "code": "OK", "operation": "chat", "model": "m"}
    return Call(GENERATE, **{**known, **values})  # type: ignore[arg-type]


def edges(made: Call) -> list[tuple[str, float, float]]:
    return [(phase.name, phase.began_s, phase.ended_s) for phase in phases_of(made)]


def test_phases_follow_each_other() -> None:
    found = edges(call(ready_s=100.0, started_s=101.0, timings=TIMES))
    assert found == [("queue", 100, 101), ("prefill", 101, 103), ("decode", 103, 107)]


def test_load_comes_before_the_queue_which_does_not_count_it() -> None:
    found = edges(call(ready_s=100.5, started_s=101.0, timings=TIMES))
    assert found[:2] == [("load", 100, 100.5), ("queue", 100.5, 101)]


@pytest.mark.parametrize(
    ("known", "phases"),
    [
        ({}, [("load", 100, 110)]),  # no model
        ({"ready_s": 100.0}, [("queue", 100, 110)]),  # no slot
        ({"ready_s": 100.0, "started_s": 104.0}, [("queue", 100, 104)]),
        ({"operation": ""}, []),
    ],
)
def test_call_that_was_cut_off_tells_what_it_waited_for(
    known: dict[str, object], phases: list[tuple[str, float, float]]
) -> None:
    assert edges(call(code="CANCELLED", **known)) == phases


def test_preemptions_are_told_with_the_decode() -> None:
    decode = phases_of(call(ready_s=100.0, timings=TIMES))[-1]
    assert decode.attributes["bear_grpc.preemption.count"] == 2


def test_call_that_was_cut_off_tells_what_it_had_drawn() -> None:
    cut = call(code="CANCELLED", ready_s=100.0, usage=Usage(7, 3, 0), told_tokens=5)
    told = attributes_of(cut)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (7, 5)


def test_identity_of_a_caller_is_told_and_its_address_without_a_port() -> None:
    told = attributes_of(call(peer="ipv4:10.0.0.1:50000", caller=Caller(id="key", tenant="key")))
    assert (told["user.id"], told["network.peer.address"]) == ("key", "10.0.0.1")
    assert "user.id" not in attributes_of(call(peer="unix:"))


@pytest.mark.parametrize(
    ("code", "is_fault"),
    [
        *(("UNAVAILABLE", True), ("INTERNAL", True), ("DEADLINE_EXCEEDED", True)),
        *(("OK", False), ("CANCELLED", False), ("INVALID_ARGUMENT", False), ("RESOURCE_EXHAUSTED", False)),
    ],
)
def test_only_faults_of_the_server_are_errors(code: str, is_fault: bool) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    SpanWriter(provider).end(call(code=code, ready_s=100.0, timings=TIMES))
    *phases, span = exporter.get_finished_spans()
    assert (span.status.status_code is StatusCode.ERROR) == is_fault
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert span.end_time is not None and span.start_time is not None
    assert span.end_time - span.start_time == pytest.approx(10e9, abs=1000)
