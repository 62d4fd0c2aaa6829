"""A plain HTTP request, as little as a scraper needs."""

from __future__ import annotations

import asyncio

WAIT_S = 10.0


async def get(
    address: str, path: str, accept: str = "", *, method: str = "GET"
) -> tuple[int, dict[str, str], str]:
    """Status, headers by their small names, and the body of an answer that ends with its connection.

    Raises IncompleteReadError if there is none.
    """
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            more = f"Accept: {accept}\r\n" if accept else ""
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: {address}\r\n{more}\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = (await reader.read()).decode()
        finally:
            writer.close()
    first, *lines = head.strip().split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    return int(first.split(" ")[1]), {name.lower(): value for name, _, value in pairs}, body
