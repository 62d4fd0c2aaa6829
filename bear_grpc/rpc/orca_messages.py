"""The messages of ORCA load reports, made of `protos/xds` (`python -m tools.protos`).

They lie in a pool of their own: other packages bring the same names, and one pool takes a name only once.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory

SERVICE = "xds.service.orca.v3.OpenRcaService"
METHOD = "StreamCoreMetrics"
_DESCRIPTORS = "orca.binpb"


def _make_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    found = resources.files(__package__).joinpath(_DESCRIPTORS).read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(found).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _make_pool()
OrcaLoadReport: Any = message_factory.GetMessageClass(
    POOL.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport")
)
OrcaLoadReportRequest: Any = message_factory.GetMessageClass(
    POOL.FindMessageTypeByName("xds.service.orca.v3.OrcaLoadReportRequest")
)
