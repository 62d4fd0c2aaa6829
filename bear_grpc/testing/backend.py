"""A model without a model: logits that tell whether the engine made a mistake."""

from __future__ import annotations

import collections
import hashlib
import threading

import numpy as np

from ..backend.base import Backend, Batch, Logits, Outcome
from ..types import KvCacheType, LoadOptions, ModelInfo, SamplingParams
from .sampler import FakeSampler
from .vocabulary import FakeVocabulary

_DEFAULTS = LoadOptions(
    context_length=1024,
    max_sequences=4,
    gpu_layers=0,
    threads=1,
    batch_tokens=512,
    micro_batch_tokens=512,
    kv_cache_type=KvCacheType.F16,
)


class Misuse(Exception):
    """A call that llama.cpp would answer with an abort, or with silently wrong output."""


class FakeBackend(Backend):
    """`backend.base.Backend` without llama.cpp. Its owner is the thread that makes it.

    The logits of a token are a hash of all tokens up to it in the KV cache of
    its sequence id, so a lost, doubled or mixed-up token changes the output.
    Logits are valid until the next forward, which fills them with NaN.
    """

    def __init__(
        self,
        options: LoadOptions | None = None,
        *,
        vocabulary: FakeVocabulary | None = None,
        seed: int = 0,
        can_cut: bool = True,
    ) -> None:
        """`can_cut` False acts like a recurrent model, which can only be cleared whole."""
        merged = (options or LoadOptions()).over(_DEFAULTS)
        assert merged.context_length and merged.max_sequences and merged.batch_tokens
        pool = LoadOptions(kv_cache_tokens=merged.context_length * merged.max_sequences)
        self.options = merged.over(pool)
        self._vocabulary = vocabulary or FakeVocabulary()
        self.info = ModelInfo("fake", "fake", self.vocabulary.size, merged.context_length, 0, 0, True)
        self.kv_cache_bytes = 0
        self.threads = 0
        self.closed = False
        self.samplers: list[FakeSampler] = []
        self.entered = threading.Event()
        self._context_length, self._batch_tokens = merged.context_length, merged.batch_tokens
        self._max_sequences, self._pool = merged.max_sequences, self.options.kv_cache_tokens or 0
        self._seed, self._can_cut = seed, can_cut
        self._kv: list[list[int]] = [[] for _ in range(self._max_sequences)]
        self._rows: dict[int, Logits] = {}
        self._script: collections.deque[tuple[Outcome, int]] = collections.deque()
        self._changed = threading.Condition()
        self._held = self._abort = False
        self._owner = threading.get_ident()

    @property
    def vocabulary(self) -> FakeVocabulary:
        """The tokens given at the start."""
        return self._vocabulary

    # ---- what tests steer ---------------------------------------------------

    def fail_next(self, *outcomes: Outcome, kept: int = 0) -> None:
        """Gives the next forwards these outcomes; the first `kept` rows stay in the KV cache."""
        self._script.extend((outcome, kept) for outcome in outcomes)

    def hold(self) -> None:
        """Any thread: forwards block from now on until `release` or `abort`.

        `entered` is set as soon as one has begun.
        """
        with self._changed:
            self._held = True

    def release(self) -> None:
        """Any thread: the forward that is held goes on, and later ones run through."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def kv_tokens(self, sequence_id: int) -> list[int]:
        """What the KV cache has of a sequence."""
        return list(self._kv[sequence_id])

    # ---- Backend ------------------------------------------------------------

    def forward(self, batch: Batch) -> Outcome:
        """Runs one step. Raises Misuse for a batch that llama.cpp must never see."""
        self._check_call()
        self._check_batch(batch)
        self._drop_logits()
        outcome, kept = self._script.popleft() if self._script else (Outcome.DONE, 0)
        self.entered.set()
        with self._changed:
            self._changed.wait_for(lambda: self._abort or not self._held)
            if self._abort and outcome is Outcome.DONE:
                outcome = Outcome.ABORTED
        if outcome is Outcome.DONE and sum(map(len, self._kv)) + batch.size > self._pool:
            outcome = Outcome.NO_KV_ROOM
        if outcome in (Outcome.NO_KV_ROOM, Outcome.INVALID):
            kept = 0
        for row in range(batch.size if outcome is Outcome.DONE else min(kept, batch.size)):
            sequence_id = int(batch.sequence_ids[row])
            self._kv[sequence_id].append(int(batch.tokens[row]))
            if outcome is Outcome.DONE and batch.outputs[row]:
                self._rows[row] = self._logits_after(self._kv[sequence_id])
        return outcome

    def logits(self, row: int) -> Logits:
        """Logits of a row of the last forward. Raises IndexError if it has none."""
        self._check_call()
        if row not in self._rows:
            raise IndexError(f"row {row} has no logits")
        return self._rows[row]

    def make_sampler(self, params: SamplingParams) -> FakeSampler:
        """A sampler; all that were made are in `samplers`."""
        self._check_call()
        self.samplers.append(FakeSampler(params))
        return self.samplers[-1]

    def kv_length(self, sequence_id: int) -> int:
        """Tokens in the KV cache. Raises IndexError for an id out of range."""
        self._check_call()
        self._check_sequence_id(sequence_id)
        return len(self._kv[sequence_id])

    def kv_remove(self, sequence_id: int, start: int) -> bool:
        """Cuts a sequence. Raises IndexError for an id out of range."""
        self._check_call()
        self._check_sequence_id(sequence_id)
        if start < 0:
            raise Misuse(f"removal from position {start} on: llama.cpp would take all")
        if 0 < start < len(self._kv[sequence_id]) and not self._can_cut:
            return False
        del self._kv[sequence_id][start:]
        return True

    def set_threads(self, threads: int) -> None:
        """Kept in `threads`."""
        self._check_call()
        self.threads = threads

    def abort(self) -> None:
        """Any thread: the running forward, held or not, ends ABORTED."""
        with self._changed:
            self._abort = True
            self._changed.notify_all()

    def clear_abort(self) -> None:
        """Any thread: the next forward runs."""
        with self._changed:
            self._abort = False

    def close(self) -> None:
        """Ends it; any call after it is Misuse."""
        self._check_call()
        self.closed = True

    # ---- checks -------------------------------------------------------------

    def _check_call(self) -> None:
        if threading.get_ident() != self._owner:
            raise Misuse(f"called on thread {threading.current_thread().name}, not on the owner")
        if self.closed:
            raise Misuse("called after close")

    def _check_sequence_id(self, sequence_id: int) -> None:
        if not 0 <= sequence_id < self._max_sequences:
            raise IndexError(f"sequence id {sequence_id} of {self._max_sequences}")

    def _check_batch(self, batch: Batch) -> None:
        if not 0 < batch.size <= self._batch_tokens:
            raise Misuse(f"{batch.size} tokens in a batch, 1 to {self._batch_tokens} are allowed")
        outputs = int(batch.outputs[: batch.size].sum())
        if outputs > self._max_sequences:
            raise Misuse(f"{outputs} rows with logits, at most {self._max_sequences} are allowed")
        lengths = [len(tokens) for tokens in self._kv]
        for row in range(batch.size):
            token, sequence_id = int(batch.tokens[row]), int(batch.sequence_ids[row])
            if not 0 <= token < self.vocabulary.size:
                raise Misuse(f"row {row}: token {token} of a vocabulary of {self.vocabulary.size}")
            if not 0 <= sequence_id < self._max_sequences:
                raise Misuse(f"row {row}: sequence id {sequence_id} of {self._max_sequences}")
            position, expected = int(batch.positions[row]), lengths[sequence_id]
            if position != expected:
                raise Misuse(f"row {row}: position {position} in sequence {sequence_id} of {expected} tokens")
            if position >= self._context_length:
                raise Misuse(f"row {row}: position {position} in a context of {self._context_length}")
            lengths[sequence_id] += 1

    def _drop_logits(self) -> None:
        for logits in self._rows.values():
            logits.fill(np.nan)
        self._rows.clear()

    def _logits_after(self, tokens: list[int]) -> Logits:
        digest = hashlib.blake2b(np.asarray(tokens, "<i4").tobytes(), digest_size=8)
        source = np.random.Generator(np.random.PCG64([self._seed, int.from_bytes(digest.digest(), "little")]))
        return source.normal(0, 3, self.vocabulary.size).astype(np.float32)
