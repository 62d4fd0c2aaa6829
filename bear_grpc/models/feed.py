"""Every change of every model's status, to whoever watches."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from ..errors import SlowConsumer
from ..types import ModelState
from .entry import ModelStatus

MAX_QUEUED = 1024


class Watcher:
    """One reader's queue. Progress steps that nobody has read yet replace each other."""

    def __init__(self) -> None:
        self._queue: collections.deque[ModelStatus] = collections.deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._overrun = False

    def put(self, status: ModelStatus) -> None:
        """Adds a change; a reader that is MAX_QUEUED transitions late gets SlowConsumer."""
        last = self._queue[-1] if self._queue else None
        loading = status.state is ModelState.LOADING
        if loading and last and last.state is ModelState.LOADING and last.name == status.name:
            self._queue.pop()
        elif len(self._queue) >= MAX_QUEUED:
            self._overrun = True
        if not self._overrun:
            self._queue.append(status)
        self._changed.set()

    def close(self) -> None:
        """Ends the iteration after what is queued."""
        self._closed = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[ModelStatus]:
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._overrun:
                raise SlowConsumer(0.0)
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()


class StatusFeed:
    """Publishes changes to watchers and to listeners. Event loop only."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._listeners: list[Callable[[ModelStatus], None]] = []
        self._closed = False

    def publish(self, status: ModelStatus) -> None:
        """Tells everybody; never blocks."""
        for listener in self._listeners:
            listener(status)
        for watcher in self._watchers:
            watcher.put(status)

    def listen(self, listener: Callable[[ModelStatus], None]) -> None:
        """Calls `listener` for every change from now on."""
        self._listeners.append(listener)

    @contextmanager
    def watch(self) -> Iterator[Watcher]:
        """A queue of all changes from now on."""
        watcher = Watcher()
        self._watchers.add(watcher)
        if self._closed:
            watcher.close()
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """Ends every watcher, those to come included."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()
