"""Who computes what in the next step: pure policy, without threads, clocks or I/O."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from .sequence import MOVES, Phase, Sequence


@dataclasses.dataclass(slots=True, frozen=True)
class PlanItem:
    """A run of one sequence's tokens, `start` and `count` as positions in it."""

    sequence: Sequence
    start: int
    count: int

    @property
    def wants_logits(self) -> bool:
        """Whether the run reaches the sequence's last token, after which one is drawn."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def tokens(self) -> list[int]:
        """The tokens of the run."""
        return self.sequence.tokens[self.start : self.start + self.count]


@dataclasses.dataclass(slots=True, frozen=True)
class Plan:
    """One step: the sequences that got a slot in it, and what is computed."""

    admitted: tuple[Sequence, ...]
    items: tuple[PlanItem, ...]


class Scheduler:
    """Waiting and running sequences, and the slots between them. FIFO."""

    def __init__(self, *, max_sequences: int, batch_tokens: int, prefill_tokens: int) -> None:
        """`batch_tokens` bounds a step; `prefill_tokens` the prompt tokens in it."""
        self._batch_tokens = batch_tokens
        self._prefill_tokens = min(prefill_tokens, batch_tokens)
        self._free_ids = list(range(max_sequences - 1, -1, -1))
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: dict[int, Sequence] = {}

    def submit(self, sequence: Sequence) -> None:
        """Takes a new sequence; it waits for a slot."""
        self.waiting.append(sequence)

    def sequences(self) -> Iterator[Sequence]:
        """All that are alive, the running ones first."""
        yield from self.running.values()
        yield from self.waiting

    def plan(self) -> Plan:
        """The next step: free slots go to the head of the queue, then decode, then prefill."""
        admitted = tuple(self._admit())
        items = [
            PlanItem(sequence, sequence.num_computed, 1)
            for sequence in self.running.values()
            if sequence.phase is Phase.DECODE and sequence.credit > 0
        ]
        budget = min(self._prefill_tokens, self._batch_tokens - len(items))
        for sequence in self.running.values():
            if sequence.phase is Phase.PREFILL and budget > 0:
                count = min(sequence.num_left, budget)
                items.append(PlanItem(sequence, sequence.num_computed, count))
                budget -= count
        return Plan(admitted, tuple(items))

    def commit(self, plan: Plan) -> None:
        """The plan has been computed: its tokens are in the KV cache."""
        for item in plan.items:
            item.sequence.num_computed += item.count
            if item.sequence.phase is Phase.PREFILL and item.wants_logits:
                self._move(item.sequence, Phase.DECODE)

    def end(self, sequence: Sequence, phase: Phase) -> int | None:
        """Moves to a terminal phase; gives the sequence id that is free now, if it had one."""
        had_slot = sequence.phase is not Phase.WAITING
        self._move(sequence, phase)
        if not had_slot:
            self.waiting.remove(sequence)
            return None
        del self.running[sequence.id]
        self._free_ids.append(sequence.sequence_id)
        return sequence.sequence_id

    def _admit(self) -> Iterator[Sequence]:
        while self.waiting and self._free_ids:
            sequence = self.waiting.popleft()
            sequence.sequence_id = self._free_ids.pop()
            self.running[sequence.id] = sequence
            self._move(sequence, Phase.PREFILL)
            yield sequence

    def _move(self, sequence: Sequence, phase: Phase) -> None:
        if phase not in MOVES[sequence.phase]:
            raise RuntimeError(f"sequence {sequence.id}: {sequence.phase.name} -> {phase.name}")
        sequence.phase = phase
