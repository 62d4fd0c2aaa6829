"""`bear descriptors`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor
    from google.protobuf.descriptor_pb2 import FileDescriptorSet


def descriptors(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where to write; default: stdout.")
    ] = None,
) -> None:
    """Write the API as a FileDescriptorSet, for Envoy, grpcurl and others that read no .proto files."""
    if file is None and sys.stdout.isatty():
        raise typer.BadParameter("the set is binary: name a file, or send stdout to one")
    data = _descriptor_set().SerializeToString(deterministic=True)
    if file is None:
        sys.stdout.buffer.write(data)
        return
    try:
        file.write_bytes(data)
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}") from None
    output.note(f"{file}: {len(data):,} bytes")


def _descriptor_set() -> FileDescriptorSet:
    """All services of the server's that a gateway may show, and what they import, imports first."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from google.rpc import error_details_pb2, status_pb2
    from grpc_health.v1 import health_pb2

    from bear_grpc.v1 import errors_pb2, inference_service_pb2, model_service_pb2, server_service_pb2

    found: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        if file.name not in found:
            for imported in file.dependencies:
                add(imported)
            found[file.name] = file

    # Nobody imports the last two: statuses carry their messages as Any, whose readers must know them.
    for module in (
        inference_service_pb2,
        model_service_pb2,
        server_service_pb2,
        errors_pb2,
        health_pb2,
        status_pb2,
        error_details_pb2,
    ):
        add(module.DESCRIPTOR)
    files = FileDescriptorSet()
    for file in found.values():
        file.CopyToProto(files.file.add())
    return files
