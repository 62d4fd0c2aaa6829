"""The Python client of bear_grpc, blocking (`Client`) and for asyncio (`AsyncClient`).

    with Client() as client:
        for text in client.stream_text("bear-demo", messages=[{"role": "user", "content": "Hello"}]):
            print(text, end="", flush=True)

Errors are those of `bear_grpc.errors`, and a `CallError` for what no server worded.
"""

from bear_grpc.client.aio import AsyncClient
from bear_grpc.client.channel import DEFAULT_TARGET
from bear_grpc.client.errors import CallCancelled, CallError, CallFailed, DeadlinePassed, ServerUnreachable
from bear_grpc.client.streams import AsyncStream, Stream
from bear_grpc.client.sync import Client
from bear_grpc.client.tls import Tls

__all__ = [
    "DEFAULT_TARGET",
    "AsyncClient",
    "AsyncStream",
    "CallCancelled",
    "CallError",
    "CallFailed",
    "Client",
    "DeadlinePassed",
    "ServerUnreachable",
    "Stream",
    "Tls",
]
