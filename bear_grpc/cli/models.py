"""`bear list`, `ps`, `show`, `register` and `rm`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output
from bear_grpc.cli.costs import show_costs
from bear_grpc.cli.session import Json, Model, Server, connect

if TYPE_CHECKING:
    from bear_grpc.v1.model_service_pb2 import MetadataEntry
    from bear_grpc.v1.types_pb2 import Model as ModelMessage
    from bear_grpc.v1.types_pb2 import ModelSource, ModelStatus

_LOADED = ("loading", "ready", "unloading")


def list_(ctx: typer.Context, json: Json = False, server: Server = None) -> None:
    """List the models that the server knows."""
    from bear_grpc.v1.model_service_pb2 import ListModelsResponse

    with connect(ctx, server) as client:
        found = list(client.list_models())
    if json:
        output.print_json(ListModelsResponse(models=found))
        return
    output.table(
        ("NAME", "STATE", "SIZE", "PARAMETERS", "QUANTIZATION", "CONTEXT", "CAPABILITIES"),
        (
            (
                model.name,
                _state(model.status),
                output.size(model.size_bytes) if model.size_bytes else "",
                output.amount(model.parameter_count) if model.parameter_count else "",
                model.quantization,
                str(model.context_length or ""),
                _capabilities(model),
            )
            for model in found
        ),
        right=("SIZE", "PARAMETERS", "CONTEXT"),
    )


def ps(ctx: typer.Context, json: Json = False, server: Server = None) -> None:
    """List the models that are loaded, and what they do."""
    from bear_grpc.v1.model_service_pb2 import ListModelsResponse

    with connect(ctx, server) as client:
        found = list(client.list_models(states=_LOADED))
    if json:
        output.print_json(ListModelsResponse(models=found))
        return
    output.table(
        (
            *("NAME", "STATE", "RUNNING", "WAITING", "KV", "IDLE", "MEMORY"),
            *("PREFILLED", "CACHED", "DECODED", "PREEMPTED", "EXPIRES"),
        ),
        (
            (
                model.name,
                _state(model.status),
                str(model.status.running_count),
                str(model.status.waiting_count),
                _of_kv_cache(model.status, model.status.kv_cache_used_token_count),
                _of_kv_cache(model.status, model.status.kv_cache_idle_token_count),
                output.size(output.memory_bytes(model.status)),
                str(model.status.counters.prefill_token_count),
                str(model.status.counters.cached_token_count),
                str(model.status.counters.decode_token_count),
                str(model.status.counters.preemption_count),
                _expires(model.status),
            )
            for model in found
        ),
        right=(
            *("RUNNING", "WAITING", "KV", "IDLE", "MEMORY"),
            *("PREFILLED", "CACHED", "DECODED", "PREEMPTED"),
        ),
    )


def show(
    ctx: typer.Context,
    model: Model,
    metadata: Annotated[bool, typer.Option("--metadata", help="The GGUF metadata too.")] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """Show one model."""
    with connect(ctx, server) as client:
        response = client.get_model(model, include_metadata=metadata)
    if json:
        output.print_json(response)
        return
    found, status = response.model, response.model.status
    output.fields(
        (
            ("name", found.name),
            ("aliases", ", ".join(found.aliases)),
            ("description", found.description),
            ("source", _source(found.source)),
            ("size", output.size(found.size_bytes) if found.size_bytes else ""),
            ("sha256", found.sha256),
            ("architecture", found.architecture),
            ("quantization", found.quantization),
            ("parameters", output.amount(found.parameter_count) if found.parameter_count else ""),
            ("context length", str(found.context_length or "")),
            ("license", found.license),
            ("capabilities", _capabilities(found)),
            ("state", _state(status)),
            ("message", status.message),
            ("memory", output.size(output.memory_bytes(status)) if status.HasField("memory") else ""),
            ("requests", _requests(status)),
            (
                "options",
                _set_fields(
                    status.effective_options if status.HasField("effective_options") else found.load_options
                ),
            ),
            ("defaults", _set_fields(found.defaults)),
        )
    )
    if found.cost_tables:
        output.say("")
        show_costs(found)
    if metadata:
        output.say("")
        output.fields((entry.key, _value(entry)) for entry in response.metadata)


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
        output.say(f"{response.model.name} is registered: {_source(response.model.source)}")


def rm(ctx: typer.Context, model: Model, json: Json = False, server: Server = None) -> None:
    """Forget a registered model, or remove a pulled one.

    A registered model's file stays where it is.
    """
    with connect(ctx, server) as client:
        response = client.delete_model(model)
    if json:
        output.print_json(response)
    else:
        output.say(f"{model} is removed, {output.size(response.released_bytes)} are free again")


def _state(status: ModelStatus) -> str:
    from bear_grpc.cli.progress import stage_name
    from bear_grpc.v1 import types_pb2 as types

    # The set may grow: a new state is shown as its number.
    state = types.ModelState.DESCRIPTOR.values_by_number.get(status.state)
    name = state.name.removeprefix("MODEL_STATE_") if state else str(status.state)
    if status.state == types.MODEL_STATE_LOADING and status.load_progress.stage:
        name += f" ({stage_name(status.load_progress.stage)} {status.load_progress.fraction:.0%})"
    return name


def _of_kv_cache(status: ModelStatus, tokens: int) -> str:
    return f"{tokens / status.kv_cache_token_count:.0%}" if status.kv_cache_token_count else ""


def _requests(status: ModelStatus) -> str:
    if not status.HasField("counters"):
        return ""
    return f"{status.running_count} running, {status.waiting_count} waiting"


def _expires(status: ModelStatus) -> str:
    from datetime import UTC

    if not status.HasField("expire_time"):
        return "never"
    return output.moment(status.expire_time.ToDatetime(UTC))


def _capabilities(model: ModelMessage) -> str:
    from bear_grpc.v1 import types_pb2 as types

    known = types.ModelCapability.DESCRIPTOR.values_by_number
    names = [known[value].name for value in model.capabilities if value in known]
    return ", ".join(name.removeprefix("MODEL_CAPABILITY_").lower() for name in names)


def _source(source: ModelSource) -> str:
    kind = source.WhichOneof("kind")
    if kind == "hub":
        revision = f"@{source.hub.revision}" if source.hub.revision else ""
        return f"{source.hub.repo_id}{revision} {source.hub.file}"
    return source.file.path if kind == "file" else kind or ""


def _set_fields(message: object) -> str:
    from google.protobuf.json_format import MessageToDict
    from google.protobuf.message import Message

    assert isinstance(message, Message)
    values = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
    )


def _value(entry: MetadataEntry) -> str:
    kind = entry.WhichOneof("value")
    if kind == "array_value":
        return f"[{entry.array_value.element_count} x {entry.array_value.element_type}]"
    return "" if kind is None else str(getattr(entry, kind))
