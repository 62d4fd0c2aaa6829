"""What models hold of the memory: read, told by model, added up over all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..executor.memory import memory_of
from ..models.entry import ModelEntry, ModelStatus
from ..v1 import types_pb2 as pb


async def measured(entries: Sequence[ModelEntry]) -> list[ModelStatus]:
    """The present standing of each, with what its process holds: the kernel counts a large one's pages."""
    held = await memory_of({entry.executor for entry in entries if entry.executor is not None})
    # Who has another worker meanwhile is not known by what was read.
    return [
        entry.status(process_bytes=held.get(entry.executor, 0) if entry.executor is not None else 0)
        for entry in entries
    ]


def ledger_to_proto(status: ModelStatus) -> pb.MemoryLedger:
    known = status.weights_bytes + status.kv_cache_bytes + status.compute_bytes
    return pb.MemoryLedger(
        weights_bytes=status.weights_bytes,
        kv_cache_bytes=status.kv_cache_bytes,
        compute_bytes=status.compute_bytes,
        process_bytes=status.process_bytes,
        overhead_bytes=max(0, status.process_bytes - known),
    )


def total_of(statuses: Iterable[ModelStatus]) -> pb.MemoryLedger:
    """Of models that are loaded, and of processes that do not end; field by field."""
    total = pb.MemoryLedger()
    for status in statuses:
        if status.is_loaded or status.process_bytes:
            one = ledger_to_proto(status)
            for field in pb.MemoryLedger.DESCRIPTOR.fields:
                setattr(total, field.name, getattr(total, field.name) + getattr(one, field.name))
    return total
