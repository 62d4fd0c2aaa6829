"""Server reflection, v1alpha and v1: the messages are the same on the wire."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(services: list[str], server: grpc.aio.Server) -> None:
    """Serves descriptors of `services` and of reflection itself."""
    alpha = "grpc.reflection.v1alpha.ServerReflection"
    servicer: Any = reflection_aio.ReflectionServicer([*services, alpha])
    for name in (alpha, V1):
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        handlers = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
