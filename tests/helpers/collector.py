"""A stand-in for an OTLP collector on loopback: takes spans and keeps them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

from tests.helpers.rpc import WAIT_S


class Collector(pb_grpc.TraceServiceServicer):
    """The spans by name, as they come."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.is_deaf = False  # never answers
        self._changed = asyncio.Condition()

    async def Export(  # noqa: N802
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        if self.is_deaf:
            await asyncio.Event().wait()
        async with self._changed:
            for resource in request.resource_spans:
                self.resources.append(attributes(resource.resource))
                for scope in resource.scope_spans:
                    self.spans += scope.spans
            self._changed.notify_all()
        return pb.ExportTraceServiceResponse()

    async def of(self, name: str) -> Any:
        """The last span of this name, when there is one."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: self.named(name))
        return self.named(name)[-1]

    def named(self, name: str) -> list[Any]:
        """The spans of a name, or of names that end with it."""
        return [span for span in self.spans if span.name.endswith(name)]

    def children(self, span: Any) -> list[Any]:
        """The spans under a span, in the order of their beginnings."""
        found = [child for child in self.spans if child.parent_span_id == span.span_id]
        return sorted(found, key=lambda child: child.start_time_unix_nano)


def attributes(span: Any) -> dict[str, Any]:
    """The attributes of a span or a resource as Python values."""
    return {item.key: _value(item.value) for item in span.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector in this loop, on a port of its own."""
    collector = Collector()
    server = grpc.aio.server()
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(0)
