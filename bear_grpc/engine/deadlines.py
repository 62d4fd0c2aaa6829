"""When a sequence must end because its caller waits no longer. Pure policy, without a clock.

Deadlines are CLOCK_MONOTONIC seconds, 0 for none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..errors import DeadlineUnreachable
from .cost import CostModel
from .kv import KvCache
from .scheduler import LONE_PREFILL_TOKENS, Scheduler
from .sequence import Phase, Sequence

# The longer of these is left between a stream's end and its deadline: for the way to its reader.
MARGIN_STEPS, LEAST_MARGIN_S = 2, 0.1


class Deadlines:
    """The deadlines of one engine's sequences. Owner thread only."""

    def __init__(self, scheduler: Scheduler, kv: KvCache, cost: CostModel, batch_tokens: int) -> None:
        """`batch_tokens` are the most of a step."""
        self._scheduler = scheduler
        self._kv = kv
        self._cost = cost
        self._batch_tokens = batch_tokens
        self._earliest_s = math.inf  # of all, or of one that has ended
        self._newest: Sequence | None = None

    def take(self, sequence: Sequence) -> None:
        """A sequence that has just begun to wait."""
        if sequence.deadline_s:
            self._earliest_s = min(self._earliest_s, sequence.deadline_s)
        before = [self._newest] if self._newest is not None and self._newest.is_live else []
        sequence.num_new = sequence.num_left - self._kv.foresee(sequence, before)
        self._newest = sequence

    def unreachable_s(self, sequence: Sequence, now: float) -> float | None:
        """Seconds until its first token, if by them its deadline comes first; else None."""
        if not sequence.deadline_s:
            return None
        left_s = sequence.deadline_s - now
        # That nearly all have time enough is known without looking at who comes before whom.
        if self._reading_s(sum(other.num_new for other in self._scheduler.waiting)) < left_s:
            return None
        first_token_s = self.first_token_s(sequence)
        return None if first_token_s < left_s else first_token_s

    def first_token_s(self, sequence: Sequence) -> float:
        """Its prompt and those that wait for a slot before it are read, as far as they are not cached.

        How long slots stay taken nobody knows.
        """
        ahead = self._scheduler.ahead_of(sequence)
        tokens = sequence.num_new
        if len(ahead) >= self._scheduler.free_slots:
            tokens += sum(other.num_new for other in ahead)
        return self._reading_s(tokens)

    def passed(self, sequence: Sequence) -> DeadlineUnreachable:
        """The error of one that still waits for a slot when its deadline comes."""
        what = "no slot was free before the deadline for the first token"
        return DeadlineUnreachable(self.first_token_s(sequence), what)

    def _reading_s(self, tokens: int) -> float:
        chunks, rest = divmod(tokens, LONE_PREFILL_TOKENS)
        return chunks * self._cost.predict(LONE_PREFILL_TOKENS) + self._cost.predict(rest)

    def due(self, live: Iterable[Sequence], now: float) -> list[Sequence]:
        """Those whose time is over: that wait past their deadline, or run into its margin."""
        if not self._is_near(now):
            return []
        step_s = self._step_s()
        found, self._earliest_s = [], math.inf
        for sequence in live:
            if _end_s(sequence, step_s) <= now:
                found.append(sequence)
            elif sequence.deadline_s:
                self._earliest_s = min(self._earliest_s, sequence.deadline_s)
        return found

    def step_limit_s(self, now: float) -> float:
        """How long the next step may take so that no running stream is still in it when it is to end."""
        if not self._is_near(now):
            return math.inf
        step_s = self._step_s()
        ends = (_end_s(sequence, step_s) for sequence in self._scheduler.running.values())
        # What is due is so one step before its margin.
        return min(ends, default=math.inf) + step_s - now

    def next_s(self, live: Iterable[Sequence]) -> float:
        """When the next of them is due; infinite if none has a deadline."""
        step_s = self._step_s()
        return min((_end_s(sequence, step_s) for sequence in live), default=math.inf)

    def _is_near(self, now: float) -> bool:
        """Whether a deadline may matter to the next step: looking at each sequence takes time."""
        longest_s = self._cost.predict(self._batch_tokens)
        return self._earliest_s <= now + (MARGIN_STEPS + 1) * longest_s + LEAST_MARGIN_S

    def _step_s(self) -> float:
        """The shortest step that takes every running stream on."""
        decoding = sum(s.phase is Phase.DECODE for s in self._scheduler.running.values())
        return self._cost.predict(max(1, decoding))


def _end_s(sequence: Sequence, step_s: float) -> float:
    """When it must end: one that has begun before its margin, and before a step that would pass it."""
    if not sequence.deadline_s:
        return math.inf
    if not sequence.has_begun:
        return sequence.deadline_s
    return sequence.deadline_s - max(LEAST_MARGIN_S, MARGIN_STEPS * step_s) - step_s
