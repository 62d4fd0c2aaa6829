"""A model without a model: logits that tell whether the engine made a mistake."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping

import numpy as np

from ..backend.base import Backend, Batch, KvTraits, Logits, Outcome
from ..load_plan import PROMPT_OUTPUTS
from ..load_plan import sequence_ids as default_sequence_ids
from ..params import SamplingParams
from ..types import KvCacheType, LoadOptions, ModelInfo
from .clock import FakeClock
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
    kv_unified=True,
)
_SAVED = b"fake kv "  # what a saved state begins with


class Misuse(Exception):
    """A call that llama.cpp would answer with an abort, or with silently wrong output."""


@dataclasses.dataclass(eq=False, slots=True)
class _Cell:
    """Room for one token, and how many sequences have it."""

    token: int
    owners: int = 1


class FakeBackend(Backend):
    """`backend.base.Backend` without llama.cpp. Its owner is the thread that makes it.

    The logits of a token are a hash of all tokens up to it in the KV cache of
    its sequence id, so a lost, doubled or mixed-up token changes the output.
    Logits are valid until the next forward, which fills them with NaN. A cell
    that several sequences share takes room once; where the room is not unified,
    each sequence id has its own part and copies take their own cells.
    """

    def __init__(
        self,
        options: LoadOptions | None = None,
        *,
        vocabulary: FakeVocabulary | None = None,
        seed: int = 0,
        can_cut: bool = True,
        sequence_ids: int | None = None,
        max_outputs: int | None = None,
        snapshot_bytes: int = 0,
        clock: FakeClock | None = None,
        seconds_per_step: Callable[[int], float] | None = None,
    ) -> None:
        """`can_cut` False acts like a recurrent model: cleared and copied only whole, and never unified.

        `sequence_ids` and `max_outputs` are those of the native backend if unset.
        `seconds_per_step` gives the seconds of a forward by its rows, by which
        `clock` advances; one that is refused or finds no room takes none.
        """
        merged = (options or LoadOptions()).over(_DEFAULTS)
        assert merged.context_length and merged.max_sequences and merged.batch_tokens
        unified = merged.kv_unified is True and can_cut
        ids = sequence_ids or default_sequence_ids(merged.max_sequences, unified)
        if not unified and ids != merged.max_sequences:
            raise ValueError("sequence ids are max_sequences where the room is not unified")
        if (clock is None) is not (seconds_per_step is None):
            raise ValueError("clock and seconds_per_step go together")
        pool = LoadOptions(kv_cache_tokens=merged.context_length * merged.max_sequences)
        self.options = LoadOptions(kv_unified=unified).over(merged.over(pool))
        self._vocabulary = vocabulary or FakeVocabulary()
        self.info = ModelInfo("fake", "fake", self.vocabulary.size, merged.context_length, 0, 0, True)
        self.kv_cache_bytes = self.compute_bytes = 0
        self.threads = 0
        self.closed = False
        self.samplers: list[FakeSampler] = []
        self.entered = threading.Event()
        self._context_length, self._batch_tokens = merged.context_length, merged.batch_tokens
        self.kv = KvTraits(ids, self.options.kv_cache_tokens or 0, unified, can_cut, snapshot_bytes)
        self.max_outputs = max_outputs or ids + PROMPT_OUTPUTS
        self._clock, self._seconds_per_step = clock, seconds_per_step
        self._seed = seed
        self._cells: list[list[_Cell]] = [[] for _ in range(ids)]
        self._used = 0
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
        return [cell.token for cell in self._cells[sequence_id]]

    def kv_used(self) -> int:
        """Tokens that take room in the KV cache, those shared by several sequences once."""
        return self._used

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
        ids = batch.sequence_ids[: batch.size].tolist()
        if outcome is Outcome.DONE and not self._has_room(collections.Counter(ids)):
            outcome = Outcome.NO_KV_ROOM
        if outcome in (Outcome.NO_KV_ROOM, Outcome.INVALID):
            return outcome
        rows = batch.size if outcome is Outcome.DONE else min(kept, batch.size)
        for row, sequence_id in enumerate(ids[:rows]):
            self._append(sequence_id, int(batch.tokens[row]))
            if outcome is Outcome.DONE and batch.outputs[row]:
                self._rows[row] = self._logits_after(self.kv_tokens(sequence_id))
        if self._clock is not None and self._seconds_per_step is not None:
            self._clock.advance(self._seconds_per_step(batch.size))
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
        return len(self._cells[sequence_id])

    def kv_remove(self, sequence_id: int, start: int) -> bool:
        """Cuts a sequence. Raises IndexError for an id out of range."""
        self._check_call()
        self._check_sequence_id(sequence_id)
        if start < 0:
            raise Misuse(f"removal from position {start} on: llama.cpp would take all")
        cells = self._cells[sequence_id]
        if 0 < start < len(cells) and not self.kv.can_cut:
            return False
        for cell in cells[start:]:
            cell.owners -= 1
            self._used -= cell.owners == 0
        del cells[start:]
        return True

    def kv_copy(self, source: int, target: int, length: int) -> bool:
        """Copies a beginning. Raises IndexError for an id out of range, Misuse for a target in use."""
        self._check_call()
        self._check_sequence_id(source)
        self._check_empty(target)
        cells = self._cells[source]
        if not 0 < length <= len(cells):
            raise Misuse(f"copy of {length} tokens of a sequence of {len(cells)}")
        if length < len(cells) and not self.kv.can_cut:
            return False
        for cell in cells[:length]:
            if self.kv.unified:
                cell.owners += 1
                self._cells[target].append(cell)
            else:
                self._append(target, cell.token)
        return True

    def kv_save(self, sequence_id: int) -> bytes:
        """The tokens of a sequence. Raises IndexError for an id out of range."""
        self._check_call()
        self._check_sequence_id(sequence_id)
        tokens = self.kv_tokens(sequence_id)
        return _SAVED + np.asarray(tokens, "<i4").tobytes() if tokens else b""

    def kv_restore(self, sequence_id: int, data: bytes) -> bool:
        """Takes the tokens back. Raises IndexError for an id out of range, Misuse for a sequence in use."""
        self._check_call()
        self._check_empty(sequence_id)
        if not data:
            return True
        if not data.startswith(_SAVED):
            raise Misuse("restore of data that kv_save has not given")
        tokens = np.frombuffer(data[len(_SAVED) :], "<i4").tolist()
        if not self._has_room({sequence_id: len(tokens)}):
            return False
        for token in tokens:
            self._append(sequence_id, token)
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
        if not 0 <= sequence_id < self.kv.sequence_ids:
            raise IndexError(f"sequence id {sequence_id} of {self.kv.sequence_ids}")

    def _check_empty(self, sequence_id: int) -> None:
        self._check_sequence_id(sequence_id)
        if self._cells[sequence_id]:
            raise Misuse(f"sequence {sequence_id} is in use: llama.cpp would mix the two")

    def _check_batch(self, batch: Batch) -> None:
        if not 0 < batch.size <= self._batch_tokens:
            raise Misuse(f"{batch.size} tokens in a batch, 1 to {self._batch_tokens} are allowed")
        outputs = int(batch.outputs[: batch.size].sum())
        if outputs > self.max_outputs:
            raise Misuse(f"{outputs} rows with logits, at most {self.max_outputs} are allowed")
        lengths = [len(cells) for cells in self._cells]
        for row in range(batch.size):
            token, sequence_id = int(batch.tokens[row]), int(batch.sequence_ids[row])
            if not 0 <= token < self.vocabulary.size:
                raise Misuse(f"row {row}: token {token} of a vocabulary of {self.vocabulary.size}")
            if not 0 <= sequence_id < self.kv.sequence_ids:
                raise Misuse(f"row {row}: sequence id {sequence_id} of {self.kv.sequence_ids}")
            position, expected = int(batch.positions[row]), lengths[sequence_id]
            if position != expected:
                raise Misuse(f"row {row}: position {position} in sequence {sequence_id} of {expected} tokens")
            if position >= self._context_length:
                raise Misuse(f"row {row}: position {position} in a context of {self._context_length}")
            lengths[sequence_id] += 1

    # ---- cells --------------------------------------------------------------

    def _has_room(self, tokens: Mapping[int, int]) -> bool:
        """Whether so many more tokens of each sequence fit."""
        if self.kv.unified:
            return self._used + sum(tokens.values()) <= self.kv.pool_tokens
        room = self.kv.pool_tokens // self.kv.sequence_ids
        return all(len(self._cells[id]) + count <= room for id, count in tokens.items())

    def _append(self, sequence_id: int, token: int) -> None:
        self._cells[sequence_id].append(_Cell(token))
        self._used += 1

    def _drop_logits(self) -> None:
        for logits in self._rows.values():
            logits.fill(np.nan)
        self._rows.clear()

    def _logits_after(self, tokens: list[int]) -> Logits:
        digest = hashlib.blake2b(np.asarray(tokens, "<i4").tobytes(), digest_size=8)
        source = np.random.Generator(np.random.PCG64([self._seed, int.from_bytes(digest.digest(), "little")]))
        return source.normal(0, 3, self.vocabulary.size).astype(np.float32)
