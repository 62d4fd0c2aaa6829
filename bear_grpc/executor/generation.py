"""One request as its reader sees it: the events of its answers, and exactly one ending of each."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from typing import Self

import msgspec

from ..errors import BearError
from ..protocol import Cancel, Credit, Delta, Finished, Frame, Prefilled, Queued, Submit
from .journal import Event, Journal

# Credit goes back in lots: a frame per token would cost the worker a wake-up each.
CREDIT_LOT_TOKENS = 32
# Bounds a merged message: an echoed prompt with the most likely tokens takes some 600 bytes each.
MAX_MERGED_TOKENS = 256


class _Branch:
    """One answer: what has come of it and is not read yet, and the credit it is owed."""

    def __init__(self, index: int, id: int) -> None:
        self.index = index
        self.id = id
        self.events: collections.deque[Event] = collections.deque()
        self.ended = False
        self.owed = 0
        self.first_text_s: float | None = None
        self.journal = Journal()

    def take(self) -> Event:
        """The next event; what follows it and is of the same kind becomes part of it."""
        event = self.events.popleft()
        if isinstance(event, Delta):
            return self._merge(event)
        if isinstance(event, Queued | Prefilled):
            while self.events and type(self.events[0]) is type(event):
                event = self.events.popleft()
        return event

    def _merge(self, first: Delta) -> Delta:
        parts, tokens = [first], len(first.tokens)
        while self.events and isinstance(following := self.events[0], Delta):
            tokens += len(following.tokens)
            if tokens > MAX_MERGED_TOKENS:
                break
            self.events.popleft()
            parts.append(following)
        if len(parts) == 1:
            return first
        return Delta(
            first.id,
            "".join(part.text for part in parts),
            sum(part.count for part in parts),
            [token for part in parts for token in part.tokens],
        )


class Generation:
    """An async iterator of answers' indices and events: for each index Started, Delta …, one Finished.

    Before the first Started there may be Queued, for the whole request.

    Or an error, which is of all answers: what came before it is read first, the others
    are cancelled. What has queued up of an answer is given as one Delta. Credit goes back
    as the reader takes events, so a reader that stops reading stops the work. `close`
    ends the work that has not ended; always call it.
    """

    def __init__(
        self, ids: range, received_s: float, send: Callable[[Frame], None], tenant: str = ""
    ) -> None:
        """Answer i has the id `ids[i]`."""
        self.ids = ids
        self.tenant = tenant
        self.restarts_s: list[float] = []  # when a worker has died under it, CLOCK_MONOTONIC
        self._received_s = received_s
        self._send = send
        self._branches = [_Branch(index, id) for index, id in enumerate(ids)]
        # Branches with events, the one that waits longest first.
        self._readable: collections.deque[_Branch] = collections.deque()
        self._read_last: _Branch | None = None
        self._error: BearError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether every answer has its ending, from the worker or by an error."""
        return all(branch.ended for branch in self._branches)

    def push(self, event: Event) -> None:
        """The executor: an event of the worker's."""
        branch = self._branches[event.id - self.ids.start]
        if branch.ended:
            return  # cancelled, the worker did not know yet
        if isinstance(event, Queued) and self.has_started:
            return  # an answer waits again, in another worker: its place is not the request's
        if branch.journal.take(event) is None:
            return  # a new worker tells what the one before it has told
        if not branch.events:
            self._readable.append(branch)
        branch.events.append(event)
        branch.ended = isinstance(event, Finished)
        self._wake()

    @property
    def has_started(self) -> bool:
        """Whether a worker has taken up one of its answers."""
        return any(branch.journal.has_started for branch in self._branches)

    def submits(self, submit: Submit) -> list[Submit]:
        """The executor: what a worker needs to begin, or to go on where the one before it was cut off."""
        if not self.has_started:
            return [submit]
        return [
            msgspec.structs.replace(
                submit,
                id=branch.id,
                n=1,
                index=branch.index,
                credit=branch.journal.credit,
                resume=branch.journal.resume(),
            )
            for branch in self._branches
            if not branch.ended
        ]

    def fail(self, error: BearError, id: int) -> None:
        """The executor: the ending of a sequence is an error. It ends the others."""
        if not self.ended:
            self._branches[id - self.ids.start].ended = True
            self._error = error
            self.close()
            self._wake()

    def abandon(self, error: BearError) -> None:
        """The executor: ends all answers with this error; does nothing if they have ended."""
        if not self.ended:
            self._error = error
            self.close()
            self._wake()

    def close(self) -> None:
        """Ends the work that has not ended; the worker sends nothing more that is read."""
        for branch in self._branches:
            if not branch.ended:
                branch.ended = True
                self._send(Cancel(branch.id))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        self._return_credit()
        while not self._readable:
            if self._error is not None:
                raise self._error
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._read_last = branch = self._readable.popleft()
        event = branch.take()
        if branch.events:
            self._readable.append(branch)
        if isinstance(event, Delta):
            if branch.first_text_s is None and event.text:
                branch.first_text_s = time.monotonic()
            branch.owed += event.count
        elif isinstance(event, Finished) and branch.first_text_s is not None:
            timings = msgspec.structs.replace(event.timings, ttft_s=branch.first_text_s - self._received_s)
            event = msgspec.structs.replace(event, timings=timings)
        return branch.index, event

    def _return_credit(self) -> None:
        """The reader has come back: it has done with what it was given last."""
        branch = self._read_last
        if branch is not None and branch.owed >= CREDIT_LOT_TOKENS and not branch.ended:
            branch.journal.give_back(branch.owed)
            self._send(Credit(branch.id, branch.owed))
            branch.owed = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
