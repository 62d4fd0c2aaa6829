"""Every change of every model's status, to whoever watches."""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager

from .entry import ModelStatus

MAX_QUEUED = 256


class Watcher:
    """One reader's queue. A reader that keeps up gets every change, in order.

    Steps of progress that nobody has read yet replace each other. A reader that
    is MAX_QUEUED changes late gets the latest status of each model, in the order
    in which they came, until it has caught up: its queue is never longer than
    that bound and the number of models.
    """

    def __init__(self, snapshot: Iterable[ModelStatus] = ()) -> None:
        self._queue: collections.OrderedDict[int, ModelStatus] = collections.OrderedDict()
        # Where in the queue the last word of each model is.
        self._last: dict[str, int] = {}
        self._numbers = itertools.count()
        self._late = False
        self._changed = asyncio.Event()
        self._closed = False
        for status in snapshot:
            self._append(status)

    def put(self, status: ModelStatus) -> None:
        """Adds a change; never blocks."""
        place = self._last.get(status.name)
        if place is not None and status.is_step_after(self._queue[place]):
            self._queue[place] = status
        else:
            if place is not None and self._late:
                del self._queue[place]
            self._append(status)
            if not self._late and len(self._queue) > MAX_QUEUED:
                self._coalesce()
        self._changed.set()

    def close(self) -> None:
        """Ends the iteration after what is queued."""
        self._closed = True
        self._changed.set()

    @property
    def backlog(self) -> int:
        """Changes that have not been read."""
        return len(self._queue)

    async def __aiter__(self) -> AsyncIterator[ModelStatus]:
        while True:
            while self._queue:
                yield self._take()
            self._late = False
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()

    def _append(self, status: ModelStatus) -> None:
        self._last[status.name] = place = next(self._numbers)
        self._queue[place] = status

    def _take(self) -> ModelStatus:
        place, status = self._queue.popitem(last=False)
        if self._last[status.name] == place:
            del self._last[status.name]
        return status

    def _coalesce(self) -> None:
        """Keeps the last word of each model, and no other from now on."""
        self._late = True
        kept = set(self._last.values())
        for place in [place for place in self._queue if place not in kept]:
            del self._queue[place]


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
    def watch(self, snapshot: Iterable[ModelStatus] = ()) -> Iterator[Watcher]:
        """A queue of `snapshot`, taken at this moment, and of all changes from now on."""
        watcher = Watcher(snapshot)
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
