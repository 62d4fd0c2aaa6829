"""`bear load` and `bear unload`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import load_options as given
from bear_grpc.cli import output
from bear_grpc.cli.progress import ModelBar
from bear_grpc.cli.session import Json, Model, ModelOrFile, Server, connect
from bear_grpc.errors import BearError

if TYPE_CHECKING:
    from bear_grpc.client import Client
    from bear_grpc.v1.types_pb2 import ModelStatus


def load(
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
    keep_alive: given.KeepAlive = None,
    pinned: given.Pinned = None,
    json: Json = False,
    server: Server = None,
) -> None:
    """Load a model and wait until it is ready. What is not given is chosen by the server."""
    with connect(ctx, server) as client:
        try:
            with ModelBar() as bar, _watching(client, model, bar):
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
                    pinned=pinned,
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
            metavar="TIME",
            parser=given.parse_seconds,
            help="How long running requests may go on. Default: 30 s.",
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
        count = response.cancelled_count
        cut = f", {count} {'request was' if count == 1 else 'requests were'} cut" if count else ""
        output.say(
            f"{response.status.name} is unloaded, {output.size(response.released_bytes)} are free again{cut}"
        )


@contextmanager
def _watching(client: Client, model: str, bar: ModelBar) -> Iterator[None]:
    """Shows the model's statuses in the bar meanwhile. A watch that fails is no failure of the load."""
    if not bar.live:
        yield
        return
    # A file on the hub is unknown until its download begins, and a watch of an unknown name ends at once.
    named = "/" not in model
    statuses = client.watch_models(*([model] if named else ()))

    def follow() -> None:
        try:
            for response in statuses:
                if named or response.status.name == model:
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
    used = output.memory_bytes(status.memory)
    sequences = "1 sequence" if options.max_sequences == 1 else f"{options.max_sequences} sequences"
    return f"{status.name} {how}: {sequences} of up to {options.context_length} tokens, {output.size(used)}"
