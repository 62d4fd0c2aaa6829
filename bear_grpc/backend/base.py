"""What the engine asks of a model: one batch forward, logits, samplers, vocabulary."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..params import Constraint, SamplingParams
from ..types import LoadOptions, ModelInfo

Logits = NDArray[np.float32]
Ids = NDArray[np.int32]


class Outcome(enum.Enum):
    """How a forward pass ended, after llama_decode's return codes."""

    DONE = 0
    NO_KV_ROOM = 1  # nothing was applied
    ABORTED = 2  # the abort flag was seen; some tokens may be in the KV cache
    INVALID = -1  # the batch was refused; nothing was applied
    FAILED = -2  # the computation failed; some tokens may be in the KV cache


class Batch:
    """The tokens of one step, in arrays that are made once and filled by slices.

    Attributes are arrays of `capacity`, of which the first `size` are in use:
    `tokens`, `positions`, `sequence_ids` int32, `outputs` int8 (1: logits wanted).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self.tokens: Ids = np.zeros(capacity, np.int32)
        self.positions: Ids = np.zeros(capacity, np.int32)
        self.sequence_ids: Ids = np.zeros(capacity, np.int32)
        self.outputs: NDArray[np.int8] = np.zeros(capacity, np.int8)

    def clear(self) -> None:
        """Starts a new step."""
        self.size = 0

    def extend(
        self, sequence_id: int, start: int, tokens: Sequence[int], wants_logits: bool, *, every: bool = False
    ) -> int:
        """Adds `tokens` at positions from `start` on; gives the row of the last one.

        `wants_logits` is about the last one, `every` about all of them. Raises
        IndexError past the capacity: llama.cpp would abort the process.
        """
        first, last = self.size, self.size + len(tokens)
        if last > self.capacity:
            raise IndexError(f"{last} tokens in a batch of {self.capacity}")
        self.tokens[first:last] = tokens
        self.positions[first:last] = range(start, start + len(tokens))
        self.sequence_ids[first:last] = sequence_id
        self.outputs[first:last] = every
        self.outputs[last - 1] = wants_logits or every
        self.size = last
        return last - 1


class Sampler(Protocol):
    """The filters of one sequence. Owner thread only."""

    def candidates(self, logits: Logits, *, xtc: bool = False) -> tuple[Ids, Logits]:
        """Tokens that may be drawn and their changed logits, each (n_candidates,).

        `logits` is not changed. `xtc` says whether XTC works this time. With
        mirostat the filters after temperature are left out.
        """

    def accept(self, token: int) -> None:
        """Counts a token as seen, of the prompt or drawn."""

    def close(self) -> None:
        """Frees it; it is not used afterwards."""


class Matcher(Protocol):
    """A compiled constraint and how far one sequence's text is in it. One thread at a time."""

    def allows(self, token: int) -> bool:
        """Whether the token may come next. An end-of-generation token may where the text is complete."""

    def mask(self, logits: Logits) -> Logits:
        """(n_vocab,) copy of `logits` in which every token that may not come next is -inf.

        Raises ConstraintDeadEnd if none may, ConstraintTooCostly.
        """

    def accept(self, token: int) -> None:
        """Goes on by a token that `allows` or `mask` has allowed. Raises ConstraintTooCostly."""

    def is_satisfied(self) -> bool:
        """Whether the text so far is a complete one."""

    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow it."""

    def copy(self) -> Matcher:
        """Another one that stands where this one stands."""


class Vocabulary(Protocol):
    """Tokens and text. Safe from every thread."""

    size: int
    adds_space_prefix: bool
    bos_token: int  # -1 if there is none

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of the text. Raises InvalidField when it cannot be tokenized."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of a token; nothing for control tokens unless `special`."""

    def is_eog(self, token: int) -> bool:
        """Whether the model ends its generation with this token."""

    def eog_tokens(self) -> tuple[int, ...]:
        """All tokens that end a generation."""

    def control_texts(self) -> frozenset[str]:
        """The texts that `parse_special` would turn into control tokens."""

    def special_text(self, which: str) -> str:
        """Text of the token `bos` or `eos`; empty if the model has none."""

    def chat_template(self) -> str | None:
        """The model's Jinja template."""

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of a text. Raises GrammarInvalid."""


@dataclasses.dataclass(frozen=True, slots=True)
class KvTraits:
    """What the KV cache of a backend is and can do.

    `sequence_ids` is how many there are, from 0 on. `pool_tokens` is the room
    of all of them together where `unified`, else each has an equal part of it.
    Without `can_cut` a sequence can be removed only whole (recurrent models),
    and copied only at its full length. `snapshot_bytes` of host memory are for
    the states of ended sequences; 0: they are only kept in the KV cache.
    """

    sequence_ids: int
    pool_tokens: int
    unified: bool
    can_cut: bool
    snapshot_bytes: int = 0


class Backend(Protocol):
    """A loaded model with its context. Owner thread only, except where told."""

    info: ModelInfo
    options: LoadOptions
    kv_cache_bytes: int
    compute_bytes: int  # working memory of a step, logits included
    kv: KvTraits
    max_outputs: int  # rows with logits that one step may have

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""

    def forward(self, batch: Batch) -> Outcome:
        """Runs one step. Tokens must continue what their sequence has in the KV cache."""

    def logits(self, row: int) -> Logits:
        """(n_vocab,) logits of a row that wanted them; valid until the next forward."""

    def make_sampler(self, params: SamplingParams) -> Sampler:
        """A sampler with the filters of `params` up to the draw itself."""

    def kv_length(self, sequence_id: int) -> int:
        """Tokens that the KV cache has of a sequence."""

    def kv_remove(self, sequence_id: int, start: int) -> bool:
        """Removes positions from `start` on; False if the model cannot cut there."""

    def kv_copy(self, source: int, target: int, length: int) -> bool:
        """Gives the empty sequence `target` the first `length` tokens of `source`.

        Unified: they share the room. False, and nothing is changed, if the
        model cannot copy there or there is no room.
        """

    def kv_save(self, sequence_id: int) -> bytes:
        """All of a sequence's state, for `kv_restore` of this backend; empty if it has none."""

    def kv_restore(self, sequence_id: int, data: bytes) -> bool:
        """Gives an empty sequence the state from `kv_save`; False, and it is empty, without room."""

    def set_threads(self, threads: int) -> None:
        """CPU threads from the next step on."""

    def abort(self) -> None:
        """Any thread: makes the running forward end ABORTED, within one graph node on a CPU."""

    def clear_abort(self) -> None:
        """Any thread: the next forward runs."""

    def close(self) -> None:
        """Frees context and model."""
