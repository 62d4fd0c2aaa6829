"""What the server has of an answer: enough for another worker to go on where it stands."""

from __future__ import annotations

import array
import sys
import time
from collections.abc import Callable

from ..protocol import INITIAL_CREDIT_TOKENS, Delta, Finished, Prefilled, Queued, Resume, Started

Event = Queued | Started | Prefilled | Delta | Finished


class Journal:
    """One answer, as far as it was received. Event loop only.

    What another worker tells again is taken out: `Started`, and progress that was told.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ids = array.array("i")
        self._text_length = 0
        self._echoed = 0
        self._prefilled = 0
        self._state: float | None = None
        self._started_s = 0.0
        self._first_token_s = 0.0
        self._received = 0  # tokens of credit that were used
        self._returned = 0  # and given back

    @property
    def has_started(self) -> bool:
        """Whether a worker has taken the answer up."""
        return self._started_s > 0

    def take(self, event: Event) -> Event | None:
        """Notes an event of a worker's; None if the reader has it already."""
        match event:
            case Delta():
                self._take_delta(event)
            case Started():
                if self.has_started:
                    return None
                self._started_s = self._clock()
            case Prefilled():
                if event.done <= self._prefilled:
                    return None
                self._prefilled = event.done
        return event

    def give_back(self, tokens: int) -> None:
        """The reader has taken so many tokens."""
        self._returned += tokens

    @property
    def credit(self) -> int:
        """Tokens that another worker may send before the reader takes some."""
        return INITIAL_CREDIT_TOKENS + self._returned - self._received

    def resume(self) -> Resume | None:
        """Where to go on; None if nothing has come yet."""
        if not self._ids and not self._echoed:
            return None
        ids = self._ids
        if sys.byteorder == "big":
            ids = array.array("i", ids)
            ids.byteswap()
        return Resume(
            ids.tobytes(),
            self._text_length,
            self._echoed,
            self._state,
            admitted_s=self._started_s,
            first_token_s=self._first_token_s,
        )

    def _take_delta(self, delta: Delta) -> None:
        self._received += delta.count
        if delta.echoed:
            self._echoed = delta.echoed
            return
        if delta.ids:
            self._first_token_s = self._first_token_s or self._clock()
            self._ids.extend(delta.ids)
            self._state = delta.state
        self._text_length += len(delta.text)
