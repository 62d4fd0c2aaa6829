"""A small HTTP server for `GET /metrics`: in the event loop, one answer a connection, all of it bounded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from .exposition import OPEN_METRICS, PLAIN, is_open_metrics

log = logging.getLogger(__name__)

PATH = "/metrics"
MAX_HEAD_BYTES = 16 * 1024
# A client that is slower than this to ask or to read, or one too many, is cut off. Long enough for a machine
# with more work than cores: Prometheus itself waits 10 s.
PATIENCE_S = 10.0
MAX_CONNECTIONS = 16
_INDEX = b'<a href="/metrics">metrics</a>\n'


class ScrapeServer:
    """Event loop only. `page` gives the text, in OpenMetrics' format or in Prometheus' own."""

    def __init__(self, page: Callable[[bool], Awaitable[bytes]]) -> None:
        self.address = ""
        self._page = page
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int) -> None:
        """Listens; `address` is then where, as HOST:PORT. Raises OSError."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_HEAD_BYTES)
        bound = self._server.sockets[0].getsockname()[1]
        self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= MAX_CONNECTIONS:
                async with asyncio.timeout(PATIENCE_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                # How long the page takes is not the client's doing.
                writer.write(await self._answer(head.decode("latin-1")))
                async with asyncio.timeout(PATIENCE_S):
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        except Exception:
            log.exception("a scrape failed")
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, head: str) -> bytes:
        first, *lines = head.split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response("400 Bad Request", "text/plain", b"")
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "text/plain", b"", "Allow: GET, HEAD\r\n")
        path = target.partition("?")[0]
        if path == PATH:
            open_metrics = is_open_metrics(_accepted(lines))
            kind, body = OPEN_METRICS if open_metrics else PLAIN, await self._page(open_metrics)
        elif path == "/":
            kind, body = "text/html", _INDEX
        else:
            return _response("404 Not Found", "text/plain", b"")
        return _response("200 OK", kind, body, without_body=method == "HEAD")


def _accepted(lines: list[str]) -> str:
    pairs = (line.partition(":") for line in lines)
    return ",".join(value for name, _, value in pairs if name.strip().lower() == "accept")


def _response(status: str, kind: str, body: bytes, more: str = "", *, without_body: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"{more}Vary: Accept\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if without_body else body)
