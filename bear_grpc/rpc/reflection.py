"""Server reflection, v1alpha and v1: the messages are the same on the wire."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

from .orca_messages import POOL as ORCA

V1 = "grpc.reflection.v1.ServerReflection"


class _Pools:
    """Looks up descriptors in one pool after the other; all that the servicer of reflection asks for."""

    def __init__(self, *pools: Any) -> None:
        self._pools = pools

    def __getattr__(self, name: str) -> Any:
        def find(*args: Any) -> Any:
            for pool in self._pools[:-1]:
                with contextlib.suppress(KeyError):
                    return getattr(pool, name)(*args)
            return getattr(self._pools[-1], name)(*args)

        return find


def add_reflection(services: list[str], server: grpc.aio.Server) -> None:
    """Serves descriptors of `services` and of reflection itself."""
    alpha = "grpc.reflection.v1alpha.ServerReflection"
    servicer: Any = reflection_aio.ReflectionServicer(
        [*services, alpha], _Pools(descriptor_pool.Default(), ORCA)
    )
    for name in (alpha, V1):
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        handlers = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
