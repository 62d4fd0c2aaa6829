"""A loaded model and its context, behind the engine's interface.

Return codes, lifetimes and the calls that abort the process are those of
llama.cpp at the version that the pinned llama-cpp-python carries.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import host
from ..errors import EngineStartFailed
from ..load_plan import SNAPSHOT_SHARE_OF_MEMORY
from ..params import SamplingParams
from ..types import LoadOptions, LoadStage
from .base import Batch, KvTraits, Logits, Outcome
from .context_log import device_uses, native_lines
from .loading import (
    context_params,
    effective_options,
    is_recurrent,
    model_info,
    model_params,
    open_context,
    open_model,
)
from .memory import LlamaMemory
from .native import bind_logits, lib, native_log
from .sampler import Candidates, LlamaSampler
from .vocabulary import LlamaVocabulary

_OUTCOMES = {0: Outcome.DONE, 1: Outcome.NO_KV_ROOM, 2: Outcome.ABORTED, -1: Outcome.INVALID}

Report = Callable[[LoadStage, float], None]


class LlamaBackend:
    """A model and its context. See `backend.base.Backend` for threads and meaning."""

    def __init__(self, path: Path, asked: LoadOptions, *, cores: int, report: Report) -> None:
        """Loads; `report` gets the progress on this thread.

        Raises ModelFileNotFound, ModelFileInvalid, InvalidField (a limit that
        only the model tells), EngineStartFailed.
        """
        with contextlib.ExitStack() as undo:
            self._model = self._load_model(path, asked, report)
            undo.callback(lib.llama_model_free, self._model)
            self.info = model_info(self._model)
            self.vocabulary = LlamaVocabulary(self._model)
            self.options = effective_options(self._model, asked, cores=cores, free_bytes=host.free_bytes())
            assert self.options.context_length is not None
            self.context_length: int = self.options.context_length
            report(LoadStage.CONTEXT, 0.0)
            self._make_context()
            undo.callback(lambda: lib.llama_free(self._context))
            self._threads = 0
            self.set_threads(self.options.threads or cores)
            report(LoadStage.WARMUP, 0.0)
            self._warm_up()
            undo.pop_all()

    def _load_model(self, path: Path, asked: LoadOptions, report: Report) -> Any:
        params = model_params(asked)
        last = -1.0

        def on_progress(fraction: float, _data: object) -> bool:
            nonlocal last
            if fraction >= last + 0.01 or fraction >= 1.0:
                last = fraction
                report(LoadStage.WEIGHTS, fraction)
            return True

        callback = lib.llama_progress_callback(on_progress)
        params.progress_callback = callback
        return open_model(path, params)

    def _make_context(self) -> None:
        options = self.options
        assert options.kv_cache_type is not None
        params = context_params(options)
        ids, self.max_outputs = params.n_seq_max, params.n_outputs_max
        # A C function that is true while its argument's first byte is not 0: seen
        # from the compute thread without taking the interpreter's lock.
        self._abort_flag = ctypes.create_string_buffer(2)
        self._abort_test = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        params.abort_callback = self._abort_test
        params.abort_callback_data = ctypes.addressof(self._abort_flag)
        with native_lines() as lines:
            self._context = open_context(self._model, params)
        cells = int(lib.llama_n_ctx(self._context))
        uses = device_uses(lines)
        self.kv_cache_bytes = sum(use.kv_cache_bytes for use in uses)
        self.compute_bytes = sum(use.compute_bytes for use in uses)
        window = lib.llama_model_n_swa(self._model)
        unified = options.kv_unified is True
        # Not of sliding windows: their snapshots cannot be cut. Not from a GPU: the way there is long.
        is_worth = not window and not options.gpu_layers
        room = min(self.kv_cache_bytes, int(host.free_bytes() * SNAPSHOT_SHARE_OF_MEMORY)) if is_worth else 0
        self.kv = KvTraits(ids, cells, unified, not is_recurrent(self._model), room)
        self._memory = LlamaMemory(self._context, self.kv, window)
        # llama.cpp takes no batch longer than the context.
        effective = LoadOptions(
            batch_tokens=lib.llama_n_batch(self._context),
            micro_batch_tokens=lib.llama_n_ubatch(self._context),
        )
        self.options = effective.over(options)
        self._bind_arrays(lib.llama_n_batch(self._context))

    def _bind_arrays(self, capacity: int) -> None:
        """Arrays that every step shares: llama.cpp gets the batch by pointers into them."""
        self._get_logits = bind_logits()
        self._logits_type = ctypes.c_float * self.vocabulary.size
        self._candidates = Candidates(self.vocabulary.size)
        self._batch_capacity = capacity
        self._one_each = np.ones(capacity, np.int32)
        self._id_pointers = np.zeros(capacity, np.uintp)
        self._bound_to: Batch | None = None
        self._native_batch = lib.llama_batch()

    def _bind(self, batch: Batch) -> None:
        if batch.capacity > self._batch_capacity:
            raise IndexError(f"a batch of {batch.capacity} tokens, llama.cpp takes {self._batch_capacity}")
        native, ids = self._native_batch, batch.sequence_ids
        self._id_pointers[: batch.capacity] = ids.ctypes.data + ids.itemsize * np.arange(batch.capacity)
        int32 = ctypes.POINTER(ctypes.c_int32)
        native.token = batch.tokens.ctypes.data_as(int32)
        native.pos = batch.positions.ctypes.data_as(int32)
        native.n_seq_id = self._one_each.ctypes.data_as(int32)
        native.seq_id = self._id_pointers.ctypes.data_as(ctypes.POINTER(int32))
        native.logits = batch.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._bound_to = batch

    def _warm_up(self) -> None:
        """Faults the weights in and allocates the graph, so that errors show now."""
        batch = Batch(1)
        batch.extend(0, 0, [0], True)
        lib.llama_set_warmup(self._context, True)
        outcome = self.forward(batch)
        lib.llama_set_warmup(self._context, False)
        if outcome is not Outcome.DONE:
            raise EngineStartFailed(f"the first step gave {outcome.name}")
        self._memory.clear()

    def forward(self, batch: Batch) -> Outcome:
        if self._bound_to is not batch:
            self._bind(batch)
        if batch.size and batch.positions[: batch.size].max() >= self.context_length:
            return Outcome.INVALID  # a pool would take it, though the model was not made for it
        self._native_batch.n_tokens = batch.size
        code = lib.llama_decode(self._context, self._native_batch)
        return _OUTCOMES.get(code, Outcome.FAILED)

    def logits(self, row: int) -> Logits:
        # llama.cpp counts negative rows from the end.
        address = self._get_logits(self._context, row) if row >= 0 else None
        if not address:
            raise IndexError(f"row {row} has no logits")
        raw: Any = self._logits_type.from_address(address)
        return np.frombuffer(raw, np.float32)

    def make_sampler(self, params: SamplingParams) -> LlamaSampler:
        return LlamaSampler(
            params,
            self._candidates,
            vocab=lib.llama_model_get_vocab(self._model),
            n_vocab=self.vocabulary.size,
            context_length=self.context_length,
        )

    def kv_length(self, sequence_id: int) -> int:
        return self._memory.length(sequence_id)

    def kv_remove(self, sequence_id: int, start: int) -> bool:
        return self._memory.remove(sequence_id, start)

    def kv_copy(self, source: int, target: int, length: int) -> bool:
        return self._memory.copy(source, target, length)

    def kv_save(self, sequence_id: int) -> bytes:
        return self._memory.save(sequence_id)

    def kv_restore(self, sequence_id: int, data: bytes) -> bool:
        return self._memory.restore(sequence_id, data)

    def set_threads(self, threads: int) -> None:
        if threads != self._threads:
            self._threads = threads
            lib.llama_set_n_threads(self._context, threads, threads)

    def abort(self) -> None:
        native_log.is_aborting = True
        self._abort_flag[0] = b"\x01"

    def clear_abort(self) -> None:
        self._abort_flag[0] = b"\x00"
        native_log.is_aborting = False

    def close(self) -> None:
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)
