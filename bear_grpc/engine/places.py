"""Who waits, at which place and about how long, and how many tokens of prompts that is.

Owner thread only; times are given, without a clock of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from ..bound import missing
from ..errors import QueueFull
from ..outflow import Outflow
from ..protocol import Queued
from .scheduler import Scheduler
from .sequence import Phase, Sequence

# No caller is told its place more often.
TELL_S = 0.5
# Sequences and tokens per second that leave the queue, as long as none have.
ASSUMED_PER_S, ASSUMED_TOKENS_PER_S = 1.0, 256.0


@dataclasses.dataclass(slots=True)
class _Told:
    sequence: Sequence
    position: int = -1
    at_s: float = -math.inf


class Places:
    """The queue of one engine as its callers see it.

    Places are counted in requests: the first of a request's answers stands for it, its prompt counts once.
    What finds a free slot tells nothing of a full queue: only what a plan has left behind is measured.
    """

    def __init__(self, scheduler: Scheduler, model: str, max_tokens: int) -> None:
        """`max_tokens` may wait, in prompts."""
        self.tokens = 0  # of prompts that wait
        self.left = 0  # sequences that had to wait and do so no longer
        self._scheduler = scheduler
        self._model = model
        self._max_tokens = max_tokens
        self._counted: dict[int, tuple[str, int]] = {}  # tenant and tokens by sequence
        self._new: list[Sequence] = []  # since the last plan
        self._held: set[int] = set()
        self._held_s = 0.0
        self._since_s = 0.0
        self._asking: dict[int, _Told] = {}  # by request
        self._due_s = math.inf
        self._slots, self._prompts = Outflow(ASSUMED_PER_S), Outflow(ASSUMED_TOKENS_PER_S)

    def take(self, sequence: Sequence, now: float) -> QueueFull | None:
        """A sequence that begins to wait; the error with which it has to end if that is too much.

        What another worker had taken is not refused.
        """
        if sequence.id == sequence.request:
            tokens = sequence.num_left
            over = missing(self._max_tokens, self.tokens, tokens, sequence.tenant, self._held_tokens)
            if over and not sequence.was_taken and not sequence.has_begun:
                self._pass(now)
                retry_s = self._prompts.retry_s(over, tokens, now)
                return QueueFull(
                    self._model, self._max_tokens, retry_s, unit="tokens", waiting=self.tokens, asked=tokens
                )
            self._counted[sequence.id] = sequence.tenant, tokens
            self.tokens += tokens
        self._new.append(sequence)
        return None

    def leave(self, sequence: Sequence, now: float) -> None:
        """It has started or ended; if it did not wait, nothing changes."""
        self._asking.pop(sequence.request, None)
        _, tokens = self._counted.pop(sequence.id, ("", 0))
        self.tokens -= tokens
        if sequence.id in self._held:
            self._pass(now)
            self._held.discard(sequence.id)
            self.left += 1
            self._slots.add(1, 0)
            self._prompts.add(tokens, 0)

    def _held_tokens(self) -> Counter[str]:
        held: Counter[str] = Counter()
        for tenant, tokens in self._counted.values():
            held[tenant] += tokens
        return held

    def held_s(self, now: float) -> float:
        """Seconds in which some sequence had to wait, up to now."""
        self._pass(now)
        return self._held_s

    def look(self, now: float) -> list[Queued]:
        """What is to be told after a plan: to newcomers at once, to others now and then if it has changed."""
        has_news = bool(self._new) and self._look_at_new(now)
        if not self._asking or (not has_news and now < self._due_s):
            return []
        self._pass(now)
        self._due_s = now + TELL_S
        return self._tell(now)

    @property
    def due_s(self) -> float:
        """When to look again even if nothing is computed; infinite if nobody asks."""
        return self._due_s if self._asking else math.inf

    def _look_at_new(self, now: float) -> bool:
        """Whether one of them wants to know its place."""
        has_news = False
        for sequence in self._new:
            if sequence.phase is not Phase.WAITING:
                continue
            if not self._held:
                self._since_s = now
            self._held.add(sequence.id)
            is_first = sequence.id == sequence.request
            if sequence.output.queue_progress and is_first and not sequence.has_begun:
                self._asking[sequence.request] = _Told(sequence)
                has_news = True
        self._new.clear()
        return has_news

    def _pass(self, now: float) -> None:
        """Time in which some wait."""
        if self._held:
            seconds = now - self._since_s
            self._since_s = now
            self._held_s += seconds
            self._slots.add(0, seconds)
            self._prompts.add(0, seconds)

    def _tell(self, now: float) -> list[Queued]:
        events = []
        # One that follows a prompt which is being read has a slot already.
        left = {told.sequence: told for told in self._asking.values() if told.sequence.phase is Phase.WAITING}
        while left:
            last = next(reversed(left))
            requests: set[int] = set()
            for place, sequence in enumerate([*self._scheduler.ahead_of(last), last]):
                told = left.pop(sequence, None)
                if told is not None:
                    position = len(requests) - (sequence.request in requests)
                    if position != told.position and now - told.at_s >= TELL_S:
                        told.position, told.at_s = position, now
                        events.append(Queued(sequence.id, position, self._wait_s(place)))
                requests.add(sequence.request)
        return events

    def _wait_s(self, place: int) -> float:
        """Predicted, for one that `place` sequences go before; 0 while unknown."""
        seconds = self._slots.seconds(place + 1)
        return seconds if self._slots.is_measured and math.isfinite(seconds) else 0.0
