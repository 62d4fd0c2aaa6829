"""The messages of ORCA load reports, as on the wire.

They lie in a pool of their own: other packages bring the same names, and one pool takes a name only once.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory

SERVICE = "xds.service.orca.v3.OpenRcaService"
METHOD = "StreamCoreMetrics"
DATA, RPC = "xds.data.orca.v3", "xds.service.orca.v3"

_Field = descriptor_pb2.FieldDescriptorProto
# Name and number. Values are doubles, or maps from names to doubles.
_DOUBLES = {
    "cpu_utilization": 1,
    "mem_utilization": 2,
    "rps_fractional": 6,
    "eps": 7,
    "application_utilization": 9,
}
_MAPS = {"request_cost": 4, "utilization": 5, "named_metrics": 8}


def _report_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/data/orca/v3/orca_load_report.proto", package=DATA, syntax="proto3"
    )
    report = file.message_type.add(name="OrcaLoadReport")
    for name, number in _DOUBLES.items():
        report.field.add(name=name, number=number, type=_Field.TYPE_DOUBLE, label=_Field.LABEL_OPTIONAL)
    for name, number in _MAPS.items():
        entry = report.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
        entry.field.add(name="value", number=2, type=_Field.TYPE_DOUBLE, label=_Field.LABEL_OPTIONAL)
        report.field.add(
            name=name,
            number=number,
            type=_Field.TYPE_MESSAGE,
            type_name=f".{DATA}.OrcaLoadReport.{entry.name}",
            label=_Field.LABEL_REPEATED,
        )
    return file


def _service_file(report_file: str) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="xds/service/orca/v3/orca.proto",
        package=RPC,
        syntax="proto3",
        dependency=[duration_pb2.DESCRIPTOR.name, report_file],
    )
    request = file.message_type.add(name="OrcaLoadReportRequest")
    request.field.add(
        name="report_interval",
        number=1,
        type=_Field.TYPE_MESSAGE,
        type_name=".google.protobuf.Duration",
        label=_Field.LABEL_OPTIONAL,
    )
    request.field.add(
        name="request_cost_names", number=2, type=_Field.TYPE_STRING, label=_Field.LABEL_REPEATED
    )
    service = file.service.add(name=SERVICE.rpartition(".")[2])
    service.method.add(
        name=METHOD,
        input_type=f".{RPC}.OrcaLoadReportRequest",
        output_type=f".{DATA}.OrcaLoadReport",
        server_streaming=True,
    )
    return file


def _make_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    report = _report_file()
    for file in (report, _service_file(report.name)):
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _make_pool()
OrcaLoadReport: Any = message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"{DATA}.OrcaLoadReport"))
OrcaLoadReportRequest: Any = message_factory.GetMessageClass(
    POOL.FindMessageTypeByName(f"{RPC}.OrcaLoadReportRequest")
)
