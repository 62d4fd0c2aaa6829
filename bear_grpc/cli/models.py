"""`bear list`, `ps`, `register`, `rm` and `prune`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output, words
from bear_grpc.cli.advice import report
from bear_grpc.cli.session import Json, Server, connect
from bear_grpc.errors import BearError

if TYPE_CHECKING:
    from bear_grpc.v1.types_pb2 import Model, ModelStatus

# No model can have this name.
_TOTAL = "(total)"
_LEDGER = {
    "WEIGHTS": "weights_bytes",
    "CACHE": "kv_cache_bytes",
    "COMPUTE": "compute_bytes",
    "OVERHEAD": "overhead_bytes",
}
_COUNTERS = {
    "STEPS": "step_count",
    "PREFILLED": "prefill_token_count",
    "CACHED": "cached_token_count",
    "DECODED": "decode_token_count",
    "PREEMPTED": "preemption_count",
}


def list_(
    ctx: typer.Context,
    all_: Annotated[bool, typer.Option("--all", "-a", help="Those too that can be pulled.")] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """List the models that are on the server."""
    from bear_grpc.v1.model_service_pb2 import ListModelsResponse

    with connect(ctx, server) as client:
        known = list(client.list_models())
    shown = [model for model in known if all_ or _is_here(model)]
    if json:
        output.print_json(ListModelsResponse(models=shown))
        return
    output.table(
        ("NAME", "SIZE", "QUANT", "STATE", "CONTEXT"),
        (
            (
                model.name,
                output.size(model.size_bytes) if model.size_bytes else "",
                model.quantization,
                words.state(model.status),
                str(model.context_length or ""),
            )
            for model in shown
        ),
        right=("SIZE", "CONTEXT"),
        dim={place for place, model in enumerate(shown) if not _is_here(model)},
    )
    if known and not shown:
        output.note(f"no model is here yet; `bear list --all` shows {len(known)} that can be pulled")


def ps(
    ctx: typer.Context,
    memory: Annotated[bool, typer.Option("--memory", help="What the memory is used for too.")] = False,
    counters: Annotated[
        bool, typer.Option("--counters", help="What the workers have done since they started too.")
    ] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """List the models that are loaded, and what they do."""
    from bear_grpc.v1.model_service_pb2 import ListModelsResponse

    with connect(ctx, server) as client:
        found = [model for model in client.list_models() if _has_worker(model)]
    if json:
        output.print_json(ListModelsResponse(models=found))
        return
    parts = _LEDGER if memory else {}
    more = _COUNTERS if counters else {}
    rows = [
        (
            model.name,
            words.state(model.status),
            *_memory([model.status], parts.values()),
            str(model.status.running_count),
            str(model.status.waiting_count),
            _of_kv_cache(model.status, model.status.kv_cache_used_token_count),
            _of_kv_cache(model.status, model.status.kv_cache_idle_token_count),
            words.until(model.status),
            "yes" if model.status.effective_options.pinned else "no",
            *(str(getattr(model.status.counters, field)) for field in more.values()),
        )
        for model in found
    ]
    if len(found) > 1:
        statuses = [model.status for model in found]
        running = str(sum(status.running_count for status in statuses))
        waiting = str(sum(status.waiting_count for status in statuses))
        rest = [""] * (4 + len(more))
        rows.append((_TOTAL, "", *_memory(statuses, parts.values()), running, waiting, *rest))
    output.table(
        ("NAME", "STATE", "MEMORY", *parts, "RUNNING", "WAITING", "KV", "IDLE", "UNTIL", "PINNED", *more),
        rows,
        right=("MEMORY", *parts, "RUNNING", "WAITING", "KV", "IDLE", *more),
        dim={len(found)},
    )


def register(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The new name.")],
    path: Annotated[str, typer.Argument(help="A GGUF file on the server.")],
    alias: Annotated[list[str] | None, typer.Option(help="Another name for it; repeatable.")] = None,
    json: Json = False,
    server: Server = None,
) -> None:
    """Make a GGUF file on the server known under a name."""
    with connect(ctx, server) as client:
        # The server knows nothing of this process's folder.
        response = client.register_model(name, os.path.abspath(path), aliases=alias or ())
    if json:
        output.print_json(response)
    else:
        output.say(f"{response.model.name} is registered: {words.source(response.model.source)}")


def rm(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names of models.")],
    json: Json = False,
    server: Server = None,
) -> None:
    """Forget registered models, and remove pulled ones.

    A registered model's file stays where it is. What cannot be removed does not keep the others.
    """
    from bear_grpc.client import CallError
    from bear_grpc.v1.model_service_pb2 import DeleteModelResponse

    released_bytes, all_removed = 0, True
    with connect(ctx, server) as client:
        for model in models:
            try:
                response = client.delete_model(model)
            except CallError:  # no answer for this one, so none for the others
                raise
            except BearError as error:
                report(error)
                all_removed = False
                continue
            released_bytes += response.released_bytes
            if not json:
                output.say(f"{model} is removed, {output.size(response.released_bytes)} are free again")
    if json:
        output.print_json(DeleteModelResponse(released_bytes=released_bytes))
    if not all_removed:
        raise typer.Exit(1)


def prune(
    ctx: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """Remove partial downloads and files that no model uses."""
    with connect(ctx, server) as client:
        response = client.prune_models(dry_run=dry_run)
    if json:
        output.print_json(response)
        return
    if not response.files:
        output.say("there is nothing to remove")
        return
    output.table(
        ("FILE", "SIZE"),
        ((file.path, output.size(file.size_bytes)) for file in response.files),
        right=("SIZE",),
    )
    count = "1 file" if len(response.files) == 1 else f"{len(response.files)} files"
    total = output.size(sum(file.size_bytes for file in response.files))
    output.say(f"{count}, {total} {'would be' if dry_run else 'are'} free again")


def _has_worker(model: Model) -> bool:
    """Whether it is loaded; of an unloaded one, whether a process is left that the system cannot end."""
    from bear_grpc.v1 import types_pb2 as types

    loaded = (types.MODEL_STATE_LOADING, types.MODEL_STATE_READY, types.MODEL_STATE_UNLOADING)
    return model.status.state in loaded or model.status.worker_process_id != 0


def _is_here(model: Model) -> bool:
    """Whether it is on the server, or on its way there."""
    from bear_grpc.v1.types_pb2 import MODEL_STATE_ABSENT

    return model.status.state != MODEL_STATE_ABSENT or model.status.HasField("pull")


def _memory(statuses: Iterable[ModelStatus], parts: Iterable[str]) -> list[str]:
    """What these models take together, and what of it is each of the parts."""
    ledgers = [status.memory for status in statuses]
    sums = [sum(map(output.memory_bytes, ledgers))]
    sums += [sum(getattr(ledger, part) for ledger in ledgers) for part in parts]
    return [output.size(count) for count in sums]


def _of_kv_cache(status: ModelStatus, tokens: int) -> str:
    return f"{tokens / status.kv_cache_token_count:.0%}" if status.kv_cache_token_count else ""
