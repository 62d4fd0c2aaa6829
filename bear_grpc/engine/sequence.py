"""One generation in the engine: its tokens, how far it is, what is left to do."""

from __future__ import annotations

import dataclasses
import enum

from ..backend.base import Sampler
from ..types import SamplingParams, StopParams, Timings, Usage
from .stop import TextMachine


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


# Every move that exists; terminal phases have no exit.
MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.PREFILL, Phase.CANCELLED, Phase.FAILED}),
    Phase.PREFILL: frozenset({Phase.DECODE, Phase.FINISHED, Phase.CANCELLED, Phase.FAILED}),
    Phase.DECODE: frozenset({Phase.FINISHED, Phase.CANCELLED, Phase.FAILED}),
    Phase.FINISHED: frozenset(),
    Phase.CANCELLED: frozenset(),
    Phase.FAILED: frozenset(),
}


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and progress of one generation. Owner thread only.

    `tokens` is the prompt and, after it, what was drawn; `num_computed` of them
    are in the KV cache. The last drawn token is not, until the next step.
    """

    id: int
    tokens: list[int]
    sampling: SamplingParams
    stop: StopParams
    max_tokens: int
    text: TextMachine
    received_s: float
    credit: int
    want_tokens: bool = False
    num_prompt: int = dataclasses.field(init=False)
    num_computed: int = 0
    phase: Phase = Phase.WAITING
    sequence_id: int = -1
    sampler: Sampler | None = None
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    stalled_since_s: float | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_completion(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that are not in the KV cache yet."""
        return len(self.tokens) - self.num_computed

    @property
    def is_live(self) -> bool:
        """Whether it has an ending still to come."""
        return bool(MOVES[self.phase])

    @property
    def usage(self) -> Usage:
        """Token counts up to now."""
        return Usage(self.num_prompt, 0, self.num_completion)

    def timings(self, now: float) -> Timings:
        """Times up to `now`, of the same clock as `received_s`."""
        first = self.first_token_s or now
        return Timings(
            queue_s=self.admitted_s - self.received_s,
            prefill_s=first - self.admitted_s,
            decode_s=(self.last_token_s - first) if self.num_completion else 0.0,
            total_s=now - self.received_s,
        )
