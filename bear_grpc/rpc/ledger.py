"""What models hold of the memory: read, told by model, added up over all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from ..models.entry import ModelEntry, ModelStatus
from ..v1 import types_pb2 as pb


async def measured(entries: Sequence[ModelEntry]) -> list[ModelStatus]:
    """The present standing of each, with what its process holds: the kernel counts a large one's pages."""
    executors = [entry.executor for entry in entries]
    loaded = {executor for executor in executors if executor is not None}
    held: dict[object, int] = {}
    if loaded:
        held = await asyncio.to_thread(lambda: {executor: executor.memory_bytes for executor in loaded})
    # Who has gone meanwhile, or has another worker, is not known by what was read.
    return [
        entry.status(process_bytes=held.get(executor, 0) if entry.executor is executor else 0)
        for entry, executor in zip(entries, executors, strict=True)
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
