"""What a load comes to, and how it is told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bear_grpc.access.caller import Caller
from bear_grpc.models.load import ModelLoad, ServerLoad
from bear_grpc.rpc.load import PerSecond, load_to_proto
from bear_grpc.rpc.orca import FIRST_CAPACITY, Reporter
from bear_grpc.rpc.orca_messages import OrcaLoadReport, OrcaLoadReportRequest
from bear_grpc.v1 import server_service_pb2 as pb

BUSY = ModelLoad(
    "busy",
    running=2,
    waiting=3,
    waiting_tokens=70,
    slots=4,
    kv_used_tokens=60,
    kv_idle_tokens=10,
    kv_tokens=200,
    prefill_rate=5.0,
    decode_rate=7.0,
    memory_bytes=1000,
)
QUIET = PerSecond(0.0, 0.0)
IDLE = ModelLoad("idle", slots=4, kv_used_tokens=90, kv_idle_tokens=90, kv_tokens=100, memory_bytes=500)


@pytest.mark.parametrize(
    ("load", "utilization"),
    [
        (IDLE, 0.0),
        (BUSY, 1.25),
        (ModelLoad("", running=4, slots=4), 1.0),
        (ModelLoad("", running=1, slots=4, kv_used_tokens=80, kv_tokens=100), 0.8),
        (ModelLoad("", waiting=3), 3.0),  # its worker is being started again
    ],
)
def test_utilization_of_a_model(load: ModelLoad, utilization: float) -> None:
    assert load.utilization == pytest.approx(utilization)


def test_utilization_of_the_server_is_its_busiest_models() -> None:
    assert ServerLoad([IDLE, BUSY]).utilization == 1.25
    assert ServerLoad().utilization == 0


def test_message_has_sums_and_models() -> None:
    message = load_to_proto(ServerLoad([BUSY, IDLE]), PerSecond(1.5, 0.5), Caller())
    assert message == pb.ServerLoad(
        running_count=2,
        waiting_count=3,
        waiting_token_count=70,
        slot_count=8,
        kv_cache_used_token_count=150,
        kv_cache_idle_token_count=100,
        kv_cache_token_count=300,
        prefill_tokens_per_second=5,
        tokens_per_second=7,
        requests_per_second=1.5,
        memory_bytes=1500,
        utilization=1.25,
        models=[
            pb.ModelLoad(
                name="busy",
                running_count=2,
                waiting_count=3,
                waiting_token_count=70,
                slot_count=4,
                kv_cache_used_token_count=60,
                kv_cache_idle_token_count=10,
                kv_cache_token_count=200,
                prefill_tokens_per_second=5,
                decode_tokens_per_second=7,
                memory_bytes=1000,
                utilization=1.25,
            ),
            pb.ModelLoad(
                name="idle",
                slot_count=4,
                kv_cache_used_token_count=90,
                kv_cache_idle_token_count=90,
                kv_cache_token_count=100,
                memory_bytes=500,
            ),
        ],
    )


def test_models_that_a_caller_may_not_know_of_are_in_the_sums_only() -> None:
    message = load_to_proto(ServerLoad([BUSY, IDLE]), PerSecond(0, 0), Caller(models=("i*",)))
    assert [model.name for model in message.models] == ["idle"]
    assert message.running_count == 2


def weight(reporter: Reporter, *models: ModelLoad, rate: PerSecond = QUIET) -> float:
    """As gRPC and Envoy count it, without their penalty for errors."""
    report = reporter.report(ServerLoad(models), rate)
    return float(report.rps_fractional / report.application_utilization)


def test_report_for_balancers() -> None:
    report = Reporter().report(ServerLoad([BUSY, IDLE]), PerSecond(1.5, 0.5))
    assert (report.application_utilization, report.rps_fractional, report.eps) == (1.25, 12, 4)
    assert dict(report.utilization) == {"slots": 0.25, "kv_cache": 0.25}
    assert dict(report.named_metrics) == {
        "running": 2,
        "waiting": 3,
        "waiting_tokens": 70,
        "prefill_tokens_per_second": 5,
        "decode_tokens_per_second": 7,
    }


def test_weight_is_what_a_server_is_capable_of_and_less_where_requests_wait() -> None:
    half = ModelLoad("", running=2, slots=4, decode_rate=40)
    full = ModelLoad("", running=4, slots=4, decode_rate=80)
    late = ModelLoad("", running=4, waiting=12, slots=4, decode_rate=80)
    assert [weight(Reporter(), load) for load in (half, full, late)] == [80, 80, 20]
    stuck = ModelLoad("", running=4, slots=4)
    assert 0 < weight(Reporter(), stuck) < 1


def test_idle_server_weighs_as_much_as_it_has_ever_been_capable_of() -> None:
    reporter = Reporter()
    assert weight(reporter, IDLE) == pytest.approx(FIRST_CAPACITY)
    weight(reporter, ModelLoad("", running=1, slots=4, decode_rate=50))
    weight(reporter, ModelLoad("", running=1, waiting=9, slots=1, decode_rate=50))
    assert weight(reporter, IDLE) == pytest.approx(200)


def test_orca_messages_are_those_of_the_wire() -> None:
    """Bytes as protoc's encoder writes them for the public definitions of these messages."""
    report = OrcaLoadReport(cpu_utilization=1, rps_fractional=1, application_utilization=1, eps=1)
    one = bytes.fromhex("000000000000f03f")
    assert report.SerializeToString() == b"\x09" + one + b"\x31" + one + b"\x39" + one + b"\x49" + one
    named = OrcaLoadReport(mem_utilization=1, named_metrics={"a": 1}, utilization={"b": 1})
    entries = b"\x2a\x0c\x0a\x01b\x11" + one + b"\x42\x0c\x0a\x01a\x11" + one
    assert named.SerializeToString() == b"\x11" + one + entries
    request = OrcaLoadReportRequest(request_cost_names=["c"])
    request.report_interval.seconds = 5
    assert request.SerializeToString() == b"\x0a\x02\x08\x05\x12\x01c"


def test_orca_messages_are_in_nobodys_way() -> None:
    """A program may have the same messages from another package, whose file differs by its options."""
    program = """
from bear_grpc.rpc import orca
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(
    name="xds/data/orca/v3/orca_load_report.proto", package="xds.data.orca.v3", syntax="proto3")
file.message_type.add(name="OrcaLoadReport")
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
print(descriptor_pool.Default().FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport").full_name)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.stdout == "xds.data.orca.v3.OrcaLoadReport\n", found.stderr
