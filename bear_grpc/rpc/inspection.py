"""What is in a model file, and what a load of it takes, as messages."""

from __future__ import annotations

from ..models.gguf_types import ArraySummary, GgufHeader
from ..models.memory import MemoryPlan
from ..v1 import model_service_pb2 as pb
from .convert import load_options_to_proto

_INT64_MAX = 2**63 - 1


def metadata_to_proto(header: GgufHeader) -> list[pb.MetadataEntry]:
    """One entry per GGUF key, in the order of the file."""
    entries = []
    for key, value in header.metadata.items():
        entry = pb.MetadataEntry(key=key)
        match value:
            case bool():
                entry.bool_value = value
            case int():
                entry.int_value = min(value, _INT64_MAX)
            case float():
                entry.double_value = value
            case str():
                entry.string_value = value
            case ArraySummary():
                entry.array_value.element_type = value.element_type
                entry.array_value.element_count = value.count
            case tuple():
                kind = type(value[0]).__name__ if value else ""
                entry.array_value.element_type = {"str": "string"}.get(kind, kind)
                entry.array_value.element_count = len(value)
        entries.append(entry)
    return entries


def tensors_to_proto(header: GgufHeader) -> list[pb.TensorInfo]:
    """One message per tensor, in the order of the file."""
    return [
        pb.TensorInfo(name=tensor.name, type=tensor.type, shape=tensor.shape, size_bytes=tensor.byte_count)
        for tensor in header.tensors
    ]


def mix_to_proto(header: GgufHeader) -> list[pb.TensorTypeShare]:
    """How much has which number format, the most bytes first."""
    return [
        pb.TensorTypeShare(
            type=share.type,
            tensor_count=share.tensor_count,
            parameter_count=share.element_count,
            size_bytes=share.byte_count,
        )
        for share in header.quantization_mix
    ]


def plan_to_proto(plan: MemoryPlan) -> pb.EstimateMemoryResponse:
    devices = [
        pb.DeviceMemory(
            device=need.device,
            weights_bytes=need.weights_bytes,
            kv_cache_bytes=need.kv_cache_bytes,
            compute_bytes=need.compute_bytes,
            free_bytes=need.free_bytes,
            overhead_bytes=need.overhead_bytes,
            needed_bytes=need.needed_bytes,
        )
        for need in plan.devices
    ]
    return pb.EstimateMemoryResponse(
        devices=devices, fits=plan.fits, effective_options=load_options_to_proto(plan.options)
    )
