"""What one step computes, and the bounds of it."""

from __future__ import annotations

import dataclasses

from .sequence import Sequence


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
    """One step: the sequences that begin in it, and what is computed."""

    started: tuple[Sequence, ...]
    items: tuple[PlanItem, ...]


@dataclasses.dataclass(slots=True, frozen=True)
class Budget:
    """Bounds of a step. `target_s` 0: chosen from the measured step times."""

    max_sequences: int
    batch_tokens: int
    max_outputs: int
    target_s: float = 0.0
