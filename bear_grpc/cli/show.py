"""`bear show`: one model, here or on the hub, with what is in its file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output, words
from bear_grpc.cli.costs import show_costs
from bear_grpc.cli.session import HUB_TIMEOUT_S, Json, ModelOrFile, Server, connect

if TYPE_CHECKING:
    from bear_grpc.v1.model_service_pb2 import GetModelResponse, MetadataEntry, TensorInfo, TensorTypeShare
    from bear_grpc.v1.types_pb2 import Model as ModelMessage

_TEMPLATE_KEY = "tokenizer.chat_template"


def show(
    ctx: typer.Context,
    model: ModelOrFile,
    metadata: Annotated[bool, typer.Option("--metadata", help="The GGUF metadata too.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor too.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Only the chat template.")] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """Show one model. Of a file on the hub, such as owner/repo:QUANT, only the header is read."""
    if template and (metadata or tensors):
        raise typer.BadParameter("--template shows nothing else; leave --metadata and --tensors out")
    with connect(ctx, server) as client:
        response = client.get_model(
            model, include_metadata=metadata or template, include_tensors=tensors, timeout=HUB_TIMEOUT_S
        )
    if json:
        output.print_json(response)
    elif template:
        _show_template(response)
    else:
        _show_model(response.model)
        if response.quantization_mix:
            _show_mix(response.quantization_mix)
        if response.model.cost_tables:
            output.say("")
            show_costs(response.model)
        if metadata:
            output.say("")
            output.fields((entry.key, _value(entry)) for entry in response.metadata)
        if tensors:
            _show_tensors(response.tensors)


def _show_model(model: ModelMessage) -> None:
    status = model.status
    in_force = status.effective_options if status.HasField("effective_options") else model.load_options
    output.fields(
        (
            ("name", model.name),
            ("aliases", ", ".join(model.aliases)),
            ("description", model.description),
            ("source", words.source(model.source)),
            ("size", output.size(model.size_bytes) if model.size_bytes else ""),
            ("files", ", ".join(file.file for file in model.files) if len(model.files) > 1 else ""),
            ("sha256", model.sha256),
            ("architecture", model.architecture),
            ("quantization", model.quantization),
            ("parameters", output.amount(model.parameter_count) if model.parameter_count else ""),
            ("context length", str(model.context_length or "")),
            ("license", model.license),
            ("capabilities", words.capabilities(model)),
            ("state", words.state(status)),
            ("message", status.message),
            ("memory", output.size(output.memory_bytes(status.memory)) if status.HasField("memory") else ""),
            ("requests", words.requests(status) if status.HasField("counters") else ""),
            ("until", words.until(status) if status.HasField("memory") else ""),
            ("options", words.set_fields(in_force)),
            ("defaults", words.set_fields(model.defaults) if model.HasField("defaults") else ""),
        )
    )


def _show_template(response: GetModelResponse) -> None:
    texts = [entry.string_value for entry in response.metadata if entry.key == _TEMPLATE_KEY]
    if not texts or not texts[0]:
        output.note(f"the file of {response.model.name} has no chat template")
        raise typer.Exit(1)
    output.say(texts[0].removesuffix("\n"))


def _show_mix(shares: Iterable[TensorTypeShare]) -> None:
    found = list(shares)
    total = sum(share.size_bytes for share in found)
    output.say("")
    output.table(
        ("TYPE", "TENSORS", "PARAMETERS", "SIZE", "SHARE"),
        (
            (
                share.type,
                str(share.tensor_count),
                output.amount(share.parameter_count),
                output.size(share.size_bytes),
                f"{share.size_bytes / total:.1%}" if total else "",
            )
            for share in found
        ),
        right=("TENSORS", "PARAMETERS", "SIZE", "SHARE"),
    )


def _show_tensors(tensors: Iterable[TensorInfo]) -> None:
    output.say("")
    output.table(
        ("TENSOR", "TYPE", "SHAPE", "SIZE"),
        (
            (tensor.name, tensor.type, " x ".join(map(str, tensor.shape)), output.size(tensor.size_bytes))
            for tensor in tensors
        ),
        right=("SIZE",),
    )


def _value(entry: MetadataEntry) -> str:
    kind = entry.WhichOneof("value")
    if kind == "array_value":
        return f"[{entry.array_value.element_count} x {entry.array_value.element_type}]"
    return "" if kind is None else str(getattr(entry, kind))
