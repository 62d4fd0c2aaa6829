"""A network between client and server that a test can cut: nothing arrives any more, and nobody is told."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65_536


class Proxy:
    """Passes on what comes on a port of its own, until it is cut. Event loop only.

    `pieces_sent` counts what clients have said, piece by piece.
    """

    def __init__(self, target: str) -> None:
        """`target` is `host:port`."""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.pieces_sent = 0
        self._is_cut = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """From now on every byte is lost, in both directions; connections stay open."""
        self._is_cut = True

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        there, back = await asyncio.open_connection(self._host, self._port)
        self._writers.append(back)
        for source, sink in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(self._pass_on(source, sink, is_sent=source is reader)))

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_sent: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                self.pieces_sent += is_sent
                if not self._is_cut:
                    sink.write(data)
                    await sink.drain()
        if not self._is_cut:
            sink.close()
