"""`bear estimate`: what a load would take, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from bear_grpc.cli import load_options as given
from bear_grpc.cli import output, words
from bear_grpc.cli.session import HUB_TIMEOUT_S, Json, ModelOrFile, Server, connect

if TYPE_CHECKING:
    from bear_grpc.v1.model_service_pb2 import DeviceMemory, EstimateMemoryResponse

_COLUMNS = {
    "WEIGHTS": "weights_bytes",
    "KV": "kv_cache_bytes",
    "COMPUTE": "compute_bytes",
    "OVERHEAD": "overhead_bytes",
    "NEEDED": "needed_bytes",
    "FREE": "free_bytes",
}


def estimate(
    ctx: typer.Context,
    model: ModelOrFile,
    context_length: given.ContextLength = None,
    max_sequences: given.MaxSequences = None,
    kv_cache_tokens: given.KvCacheTokens = None,
    gpu_layers: given.GpuLayers = None,
    threads: given.Threads = None,
    batch_tokens: given.BatchTokens = None,
    micro_batch_tokens: given.MicroBatchTokens = None,
    kv_cache_type: given.KvCacheType = None,
    flash_attention: given.FlashAttention = None,
    mmap: given.Mmap = None,
    mlock: given.Mlock = None,
    repack: given.Repack = None,
    kv_unified: given.KvUnified = None,
    json: Json = False,
    server: Server = None,
) -> None:
    """Tell what a load with these options would take, without loading. Exits 0 only when it fits."""
    with connect(ctx, server) as client:
        response = client.estimate_memory(
            model,
            context_length=context_length,
            max_sequences=max_sequences,
            kv_cache_tokens=kv_cache_tokens,
            gpu_layers=gpu_layers,
            threads=threads,
            batch_tokens=batch_tokens,
            micro_batch_tokens=micro_batch_tokens,
            kv_cache_type=kv_cache_type.value if kv_cache_type else None,
            flash_attention=flash_attention,
            mmap=mmap,
            mlock=mlock,
            repack=repack,
            kv_unified=kv_unified,
            timeout=HUB_TIMEOUT_S,
        )
    if json:
        output.print_json(response)
    else:
        _show(response)
    raise typer.Exit(0 if response.fits else 1)


def _show(response: EstimateMemoryResponse) -> None:
    output.table(
        ("DEVICE", *_COLUMNS, "FITS"),
        (
            (
                device.device,
                *(output.size(getattr(device, field)) for field in _COLUMNS.values()),
                "yes" if _fits(device) else "no",
            )
            for device in response.devices
        ),
        right=(*_COLUMNS,),
    )
    output.say("")
    output.fields(
        (
            ("options", words.set_fields(response.effective_options)),
            ("fits", "yes" if response.fits else _lacking(response)),
        )
    )


def _fits(device: DeviceMemory) -> bool:
    return device.needed_bytes <= device.free_bytes


def _lacking(response: EstimateMemoryResponse) -> str:
    lacking = [
        f"{output.size(device.needed_bytes - device.free_bytes)} more on {device.device}"
        for device in response.devices
        if not _fits(device)
    ]
    return f"no: {' and '.join(lacking)} would be needed" if lacking else "no"
