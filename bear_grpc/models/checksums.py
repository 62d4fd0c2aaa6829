"""SHA-256 of registered files, computed in the background."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

_CHUNK_BYTES = 4 * 2**20


class Checksums:
    """One file at a time: it takes a core, and a thread that others wait for. Event loop only."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()

    def start(self, path: Path, on_done: Callable[[str], Awaitable[None]]) -> None:
        """Has a file hashed; `on_done` gets lower case hex, and is not called for what cannot be read."""
        task = asyncio.create_task(self._run(path, on_done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Gives up what is not finished."""
        self._closing.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, path: Path, on_done: Callable[[str], Awaitable[None]]) -> None:
        async with self._turn:
            digest = await asyncio.to_thread(_sha256, path, self._closing)
        if digest:
            await on_done(digest)


def _sha256(path: Path, stop: threading.Event) -> str:
    """Empty if `stop` was set or the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                if stop.is_set():
                    return ""
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
