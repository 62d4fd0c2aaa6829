"""`bear load` and `bear unload`."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output
from bear_grpc.cli.progress import LoadBar
from bear_grpc.cli.session import Json, Model, Server, connect
from bear_grpc.errors import BearError

if TYPE_CHECKING:
    from bear_grpc.client import Client
    from bear_grpc.v1.types_pb2 import ModelStatus

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class KvCacheType(StrEnum):
    """Number formats of the KV cache."""

    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


def parse_seconds(text: str) -> float:
    """Seconds, or a number with one of s, m, h, d: `300`, `5m`, `-1`."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time: 300, 5m, 2h, -1")
    return float(match[1]) * _UNITS[match[2]]


def load(
    ctx: typer.Context,
    model: Model,
    context_length: Annotated[int | None, typer.Option(help="Most tokens of one sequence.")] = None,
    max_sequences: Annotated[int | None, typer.Option(help="Most sequences that run at a time.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="KV cache in tokens, all sequences.")] = None,
    gpu_layers: Annotated[int | None, typer.Option(help="Layers on a GPU; -1 is all.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one step.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Most tokens of one step.")] = None,
    micro_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one pass of the kernels.")] = None,
    kv_cache_type: Annotated[KvCacheType | None, typer.Option(help="Number format of the KV cache.")] = None,
    flash_attention: Annotated[bool | None, typer.Option(help="Fused attention kernels.")] = None,
    mmap: Annotated[bool | None, typer.Option(help="Map the weights from the file.")] = None,
    mlock: Annotated[bool | None, typer.Option(help="Lock the weights in memory.")] = None,
    repack: Annotated[bool | None, typer.Option(help="Rearrange the weights for this CPU.")] = None,
    kv_unified: Annotated[bool | None, typer.Option(help="One KV pool for all sequences.")] = None,
    keep_alive: Annotated[
        float | None,
        typer.Option(
            metavar="TIME",
            parser=parse_seconds,
            help="Unload after this long without use: seconds, 5m, 2h; 0 after use, -1 never.",
        ),
    ] = None,
    json: Json = False,
    server: Server = None,
) -> None:
    """Load a model and wait until it is ready. What is not given is chosen by the server."""
    with connect(ctx, server) as client:
        try:
            with LoadBar() as bar, _watching(client, model, bar):
                response = client.load_model(
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
                    keep_alive=keep_alive,
                )
        except KeyboardInterrupt:
            output.note(f"the server goes on loading; `bear unload {model}` ends it")
            raise
        if json:
            output.print_json(response)
        else:
            output.say(_loaded(response.status, response.load_seconds))


def unload(
    ctx: typer.Context,
    model: Model,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="TIME", parser=parse_seconds, help="How long running requests may go on. Default: 30 s."
        ),
    ] = None,
    json: Json = False,
    server: Server = None,
) -> None:
    """Unload a model and give its memory back."""
    with connect(ctx, server) as client:
        response = client.unload_model(model, drain_timeout=drain_timeout)
        if json:
            output.print_json(response)
            return
        cut = f", {response.cancelled_count} requests were cut" if response.cancelled_count else ""
        output.say(
            f"{response.status.name} is unloaded, {output.size(response.released_bytes)} are free again{cut}"
        )


@contextmanager
def _watching(client: Client, model: str, bar: LoadBar) -> Iterator[None]:
    """Shows the model's statuses in the bar meanwhile. A watch that fails is no failure of the load."""
    if not bar.live:
        yield
        return
    statuses = client.watch_models(model)

    def follow() -> None:
        try:
            for response in statuses:
                bar.update(response.status)
        except BearError:
            return

    follower = threading.Thread(target=follow, name="load-progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        statuses.cancel()
        follower.join()


def _loaded(status: ModelStatus, load_seconds: float) -> str:
    how = f"is ready after {output.seconds(load_seconds)}" if load_seconds else "was loaded already"
    options = status.effective_options
    used = output.memory_bytes(status)
    sequences = "1 sequence" if options.max_sequences == 1 else f"{options.max_sequences} sequences"
    return f"{status.name} {how}: {sequences} of up to {options.context_length} tokens, {output.size(used)}"
