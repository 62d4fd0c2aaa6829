"""HTTP/2 by hand, for what no gRPC client does: a connection on which the server may send no message."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4


class Reluctant:
    """A client that calls and gives no window for the answers. Event loop only.

    `settings` are the server's, by number, when it has told them.
    """

    def __init__(self, target: str) -> None:
        """`target` is `unix:PATH`."""
        self._path = Path(target.removeprefix("unix:"))
        self._next_stream = 1
        self._has_told = asyncio.Event()
        self._answered: dict[int, asyncio.Event] = {}
        self.settings: dict[int, int] = {}

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path)
        self._writer.write(PREFACE)
        self._send(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
        self._reading = asyncio.create_task(self._read())
        await self._has_told.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._writer.close()

    def give(self, stream: int, count: int) -> None:
        """The server may send so many bytes of messages."""
        self._send(WINDOW_UPDATE, 0, stream, struct.pack(">I", count))

    async def call(self, method: str, message: bytes) -> int:
        """Begins a call with one message; gives its stream when its answer has begun."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        began = self._answered[stream] = asyncio.Event()
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        # HPACK without its table and its code: a literal is 0, then name and value, each after its length.
        header = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
        self._send(HEADERS, END_HEADERS, stream, header)
        self._send(DATA, END_STREAM, stream, struct.pack(">BI", 0, len(message)) + message)
        await began.wait()
        return stream

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
        self._writer.write(head + payload)

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                if kind in (SETTINGS, PING) and not flags & ACK:
                    self._send(kind, ACK, 0, payload if kind == PING else b"")
                if kind == SETTINGS and not flags & ACK:
                    self.settings.update(struct.iter_unpack(">HI", payload))  # type: ignore[arg-type]
                    self._has_told.set()
                elif kind == HEADERS:
                    self._answered[stream].set()


def _text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()
