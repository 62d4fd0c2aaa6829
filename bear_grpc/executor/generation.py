"""One generation as its reader sees it: events, and exactly one ending."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from typing import Self

import msgspec

from ..errors import BearError
from ..protocol import Cancel, Credit, Delta, Finished, Frame, Started

# Credit goes back in lots: a frame per token would cost the worker a wake-up each.
CREDIT_LOT_TOKENS = 32

Event = Started | Delta | Finished


class Generation:
    """An async iterator of Started, Delta … and one Finished, or an error.

    What has queued up is given as one Delta. Credit goes back as the reader
    takes events, so a reader that stops reading stops the work. `close` ends
    the work if it has not ended; always call it.
    """

    def __init__(self, id: int, received_s: float, send: Callable[[Frame], None]) -> None:
        self.id = id
        self._received_s = received_s
        self._send = send
        self._events: collections.deque[Event] = collections.deque()
        self._error: BearError | None = None
        self._ended = False
        self._owed = 0
        self._first_text_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether the worker has told its ending, or an error has ended it."""
        return self._ended

    def push(self, event: Event) -> None:
        """The executor: an event of the worker's."""
        self._events.append(event)
        self._ended = self._ended or isinstance(event, Finished)
        self._wake()

    def fail(self, error: BearError) -> None:
        """The executor: the ending is an error. What has been queued is read before it."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def close(self) -> None:
        """Ends the work if it has not ended; nothing more is given."""
        if not self._ended:
            self._ended = True
            self._send(Cancel(self.id))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        self._return_credit()
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._events.popleft()
        if isinstance(event, Delta):
            return self._merge(event)
        if isinstance(event, Finished) and self._first_text_s is not None:
            timings = msgspec.structs.replace(event.timings, ttft_s=self._first_text_s - self._received_s)
            return msgspec.structs.replace(event, timings=timings)
        return event

    def _merge(self, first: Delta) -> Delta:
        """`first` with all that follows it directly in the queue."""
        parts = [first]
        while self._events and isinstance(self._events[0], Delta):
            parts.append(self._events.popleft())  # type: ignore[arg-type]
        merged = first
        if len(parts) > 1:
            merged = Delta(
                first.id,
                "".join(part.text for part in parts),
                sum(part.count for part in parts),
                [token for part in parts for token in part.tokens],
            )
        if self._first_text_s is None and merged.text:
            self._first_text_s = time.monotonic()
        self._owed += merged.count
        return merged

    def _return_credit(self) -> None:
        if self._owed >= CREDIT_LOT_TOKENS and not self._ended:
            self._send(Credit(self.id, self._owed))
            self._owed = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
