"""What a crowd of clients asks, and what each of them saw. No protocol, no clock: `crowd` plays it.

Both sides get the same asks: prompts are token ids of one seeded generator, and never twice the same, so that
a prefix that a server kept helps only where a bar wants it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

BOS = 1
# Below lie the control tokens and single bytes, of which a text may show nothing.
FIRST_PLAIN = 260
N_VOCAB = 32_000


@dataclass(frozen=True)
class Ask:
    """One greedy generation.

    It starts when the asks `after` (indexes of earlier ones in the list) have brought `after_tokens` pieces
    of text, or have ended where that is None, and then `delay_s` later. It is cancelled by its client
    `cancel_s` after its start, or `cancel_s` after its `cancel_tokens`-th piece of text, or when the ask
    `cancel_with` ends; whichever is set. It goes to another `target` of the same protocol if one is given.
    """

    prompt: list[int]
    max_tokens: int
    model: str = ""
    after: list[int] = field(default_factory=list)
    after_tokens: int | None = None
    delay_s: float = 0.0
    cancel_s: float | None = None
    cancel_tokens: int | None = None
    cancel_with: int | None = None
    target: str = ""


@dataclass
class Answer:
    """How it went. Times are seconds on the machine's monotonic clock; `times` are those of pieces of text.

    `failed` is what the server or the protocol said; a cancelled ask is no failed one.
    """

    asked_s: float = 0.0
    started_s: float | None = None
    times: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    cancelled_s: float | None = None
    completed: bool = False
    tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    failed: str = ""

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.asked_s

    @property
    def first_to_last_s(self) -> float:
        return self.times[-1] - self.times[0]


class Prompts:
    """Random prompts; the same seed gives the same ones."""

    def __init__(self, *seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def take(self, count: int) -> list[int]:
        """`count` token ids that begin with BOS."""
        return [BOS, *self.more(count - 1)]

    def more(self, count: int) -> list[int]:
        """`count` token ids without a beginning, for the end of a prompt."""
        return [int(token) for token in self._rng.integers(FIRST_PLAIN, N_VOCAB, count)]

    def between(self, low: float, high: float) -> float:
        return float(self._rng.uniform(low, high))

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self._rng.integers(low, high + 1))


def wall_s(answers: Sequence[Answer]) -> float:
    """From the first ask to the end of the last answer."""
    return max(answer.ended_s for answer in answers) - min(answer.asked_s for answer in answers)


def rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of all of them together."""
    return sum(answer.tokens for answer in answers) / wall_s(answers)


def gaps(answer: Answer, from_s: float, to_s: float) -> list[tuple[float, float]]:
    """Pauses between pieces of text that overlap the window: (end of the pause, its length), in seconds."""
    pairs = itertools.pairwise(answer.times)
    return [(end, end - begin) for begin, end in pairs if end > from_s and begin < to_s]


def longest_gap_s(answers: Iterable[Answer], from_s: float, to_s: float) -> float:
    return max((gap for answer in answers for _, gap in gaps(answer, from_s, to_s)), default=0.0)
