"""Whether new work is taken, and how much is under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from ..errors import Draining


class Gate:
    """Open from the beginning, closed once and for good. Event loop only."""

    def __init__(self) -> None:
        self._closed = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._waits: set[asyncio.Timeout] = set()

    @property
    def is_closed(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._closed

    @property
    def inside(self) -> int:
        """Calls under way."""
        return self._inside

    def check(self) -> None:
        """Raises Draining once it is closed."""
        if self._closed:
            raise Draining()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """A call, from its beginning to its last message. Raises Draining."""
        self.check()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if self._inside == 0:
                self._empty.set()

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """What a call waits for before its work begins; Draining ends it when the gate closes."""
        self.check()
        async with asyncio.timeout(None) as wait:
            self._waits.add(wait)
            try:
                yield
            except asyncio.CancelledError:
                if wait.expired():
                    raise Draining() from None
                raise
            finally:
                self._waits.discard(wait)

    def close(self) -> None:
        """Nothing new is taken, and nobody waits any longer. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        now = asyncio.get_running_loop().time() if self._waits else 0.0
        for wait in self._waits:
            wait.reschedule(now)

    async def empty(self, timeout_s: float) -> bool:
        """Waits until no call is under way, up to `timeout_s`; whether that is so."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
