"""`bear health` and `bear info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output
from bear_grpc.cli.session import Json, Server, connect

if TYPE_CHECKING:
    from bear_grpc.v1.server_service_pb2 import ServerLimits


def health(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(help="models/NAME, a full service name, or liveness.")] = "",
    json: Json = False,
    server: Server = None,
) -> None:
    """Ask whether the server, or one of its services, can take work. Exits 0 only when it is SERVING."""
    with connect(ctx, server) as client:
        response = client.health(service)
    if json:
        output.print_json(response)
    else:
        value = response.DESCRIPTOR.enum_types_by_name["ServingStatus"].values_by_number.get(response.status)
        output.say(value.name if value else str(response.status))
    raise typer.Exit(0 if response.status == response.SERVING else 1)


def info(ctx: typer.Context, json: Json = False, server: Server = None) -> None:
    """Show the server's version, devices and limits."""
    from bear_grpc.v1.server_service_pb2 import SandboxState

    with connect(ctx, server) as client:
        response = client.server_info()
    if json:
        output.print_json(response)
        return
    limits = response.limits
    state = SandboxState.Name(response.sandbox).removeprefix("SANDBOX_STATE_").lower()
    output.fields(
        (
            ("version", response.version),
            ("llama-cpp-python", response.llama_cpp_python_version),
            ("llama.cpp", response.llama_cpp_build),
            ("cores", str(response.core_count)),
            *(
                (
                    f"device {device.name}",
                    f"{device.description}, {output.size(device.free_bytes)} of "
                    f"{output.size(device.total_bytes)} free",
                )
                for device in response.devices
            ),
            ("models", f"{output.size(output.memory_bytes(response.memory))} in all"),
            ("sandbox", f"{state}, {response.sandbox_detail}" if response.sandbox_detail else state),
            ("allowed paths", ", ".join(response.allowed_paths) or "none"),
            ("longest text", output.size(limits.max_text_bytes)),
            ("largest message", output.size(limits.max_message_bytes)),
            ("waiting requests", _waiting(limits)),
            (
                "stop sequences",
                f"up to {limits.max_stop_sequences} of {limits.max_stop_sequence_bytes} bytes",
            ),
        )
    )


def _waiting(limits: ServerLimits) -> str:
    tokens = f", {limits.max_waiting_tokens} prompt tokens" if limits.max_waiting_tokens else ""
    return f"up to {limits.max_waiting_requests}{tokens} per model"
