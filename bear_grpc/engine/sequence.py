"""One generation in the engine: its tokens, how far it is, what is left to do."""

from __future__ import annotations

import dataclasses
import enum

from ..backend.base import Matcher
from ..params import OutputParams, Priority, SamplingParams, StopParams
from ..types import Timings, Usage
from .echo import Echo
from .sampling import TokenSampler
from .stop import TextMachine


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


# Every move that exists; terminal phases have no exit. Back to WAITING is preemption, and one that
# waits again finishes with what it has when its deadline comes.
_ENDS = frozenset({Phase.FINISHED, Phase.CANCELLED, Phase.FAILED})
MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.WAITING: _ENDS | {Phase.PREFILL},
    Phase.PREFILL: _ENDS | {Phase.DECODE, Phase.WAITING},
    Phase.DECODE: _ENDS | {Phase.WAITING},
    Phase.FINISHED: frozenset(),
    Phase.CANCELLED: frozenset(),
    Phase.FAILED: frozenset(),
}


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """Tokens and progress of one generation. Owner thread only.

    `tokens` is the prompt and, after it, what was drawn; `num_computed` of them
    are in the KV cache. The last drawn token is not, until the next step.
    `leader` is a sequence whose first `share_at` tokens are the same and under
    way: this one waits for them instead of computing them too. `num_charged` tokens
    have been counted as its tenant's, `planned_at` is the last step it was part of.
    """

    id: int
    # Never in a traceback.
    tokens: list[int] = dataclasses.field(repr=False)
    sampling: SamplingParams
    stop: StopParams
    max_tokens: int
    text: TextMachine
    received_s: float
    credit: int
    output: OutputParams = dataclasses.field(default_factory=OutputParams)
    scope: str = ""
    tenant: str = ""
    tag: str = ""
    priority: Priority = Priority.NORMAL
    matcher: Matcher | None = None
    echo: Echo | None = None
    truncated: int = 0
    deadline_s: float = 0.0
    num_prompt: int = dataclasses.field(init=False)
    num_computed: int = 0
    num_cached: int = 0
    num_new: int = 0
    num_charged: int = 0
    phase: Phase = Phase.WAITING
    arrival: int = 0
    order: int = 0
    planned_at: int = 0
    sequence_id: int = -1
    leader: Sequence | None = dataclasses.field(default=None, repr=False)
    share_at: int = 0
    sampler: TokenSampler | None = None
    is_started: bool = False
    told_prefilled: int = 0
    preemptions: int = 0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    sampling_s: float = 0.0
    stalled_since_s: float | None = None
    state: float | None = None  # of the sampler, where another worker has begun
    request: int = 0  # id of its request's first answer; 0: its own
    was_taken: bool = False  # another worker had it in its queue

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.request = self.request or self.id

    @property
    def num_completion(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that are not in the KV cache yet."""
        return len(self.tokens) - self.num_computed

    @property
    def most_tokens(self) -> int:
        """What it may come to: prompt and completion."""
        return self.num_prompt + self.max_tokens

    @property
    def most_cached(self) -> int:
        """How many of its tokens may come from elsewhere: one must be computed for its logits."""
        return 0 if self.output.wants_prompt_logprobs else len(self.tokens) - 1

    @property
    def has_begun(self) -> bool:
        """Whether its caller has been told of it, by this worker or by the one before it."""
        return self.is_started or self.num_completion > 0

    @property
    def is_live(self) -> bool:
        """Whether it has an ending still to come."""
        return bool(MOVES[self.phase])

    @property
    def usage(self) -> Usage:
        """Token counts up to now."""
        return Usage(self.num_prompt, self.num_cached, self.num_completion)

    def timings(self, now: float) -> Timings:
        """Times up to `now`, of the same clock as `received_s`."""
        first = self.first_token_s or now
        return Timings(
            queue_s=self.admitted_s - self.received_s,
            prefill_s=first - self.admitted_s,
            decode_s=(self.last_token_s - first) if self.num_completion else 0.0,
            total_s=now - self.received_s,
            sampling_s=self.sampling_s,
            preemptions=self.preemptions,
        )
