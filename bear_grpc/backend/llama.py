"""A loaded model and its context, behind the engine's interface.

Return codes, lifetimes and the calls that abort the process are those of
llama.cpp at the version that the pinned llama-cpp-python carries.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineStartFailed, ModelFileInvalid, ModelFileNotFound
from ..params import SamplingParams
from ..types import KvCacheType, LoadOptions, LoadStage, ModelInfo
from . import host
from .base import Batch, KvTraits, Logits, Outcome
from .memory import LlamaMemory
from .native import bind_logits, lib, meta, native_log
from .options import PROMPT_OUTPUTS, SNAPSHOT_SHARE_OF_MEMORY, Situation, choose, sequence_ids
from .sampler import Candidates, LlamaSampler
from .vocabulary import LlamaVocabulary

_LOAD_NONE, _LOAD_MMAP, _LOAD_MLOCK, _LOAD_MMAP_MLOCK = 0, 1, 2, 3
_FLASH_AUTO = -1
# ggml_type and bytes per value: block bytes by block size.
_KV_TYPES = {
    KvCacheType.F16: (1, 2.0),
    KvCacheType.BF16: (30, 2.0),
    KvCacheType.Q8_0: (8, 34 / 32),
    KvCacheType.Q4_0: (2, 18 / 32),
}
_OUTCOMES = {0: Outcome.DONE, 1: Outcome.NO_KV_ROOM, 2: Outcome.ABORTED, -1: Outcome.INVALID}

Report = Callable[[LoadStage, float], None]


def _load(path: Path, params: Any) -> Any:
    if not path.exists():
        raise ModelFileNotFound(str(path))
    native_log.errors.clear()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model is None:
        raise ModelFileInvalid(
            str(path), native_log.errors[0] if native_log.errors else "llama.cpp refuses it"
        )
    return model


def inspect(path: Path) -> ModelInfo:
    """Reads a model without its weights (`no_alloc`). Raises as a load would."""
    params = lib.llama_model_default_params()
    params.load_mode, params.no_alloc = _LOAD_NONE, True
    model = _load(path, params)
    try:
        return _model_info(model)
    finally:
        lib.llama_model_free(model)


def _model_info(model: Any) -> ModelInfo:
    buffer = ctypes.create_string_buffer(256)
    lib.llama_model_desc(model, buffer, len(buffer))
    return ModelInfo(
        description=buffer.value.decode(errors="replace"),
        architecture=meta(model, "general.architecture") or "",
        vocab_size=lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)),
        context_length_train=lib.llama_model_n_ctx_train(model),
        parameter_count=lib.llama_model_n_params(model),
        weights_bytes=lib.llama_model_size(model),
        has_chat_template=bool(lib.llama_model_chat_template(model, None)),
    )


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
            self.info = _model_info(self._model)
            self.vocabulary = LlamaVocabulary(self._model)
            self.options = self._effective(asked, cores)
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
        params = lib.llama_model_default_params()
        mmap, mlock = asked.mmap is not False, asked.mlock is True
        params.load_mode = {
            (False, False): _LOAD_NONE,
            (True, False): _LOAD_MMAP,
            (False, True): _LOAD_MLOCK,
            (True, True): _LOAD_MMAP_MLOCK,
        }[mmap, mlock]
        params.use_extra_bufts = asked.repack is not False
        params.n_gpu_layers = self._gpu_layers(asked)
        last = -1.0

        def on_progress(fraction: float, _data: object) -> bool:
            nonlocal last
            if fraction >= last + 0.01 or fraction >= 1.0:
                last = fraction
                report(LoadStage.WEIGHTS, fraction)
            return True

        callback = lib.llama_progress_callback(on_progress)
        params.progress_callback = callback
        return _load(path, params)

    @staticmethod
    def _gpu_layers(asked: LoadOptions) -> int:
        if asked.gpu_layers is not None:
            return asked.gpu_layers
        return -1 if lib.llama_supports_gpu_offload() else 0

    def _effective(self, asked: LoadOptions, cores: int) -> LoadOptions:
        """The options in force. A state of recurrent models is too big to be kept beyond what runs."""
        situation = Situation(
            context_length_train=self.info.context_length_train,
            cores=cores,
            gpu_layers=self._gpu_layers(asked),
            free_bytes=host.free_bytes(),
            kv_token_bytes={kind: self._kv_token_bytes(kind) for kind in KvCacheType},
            can_share_ids=not self._is_recurrent,
        )
        return choose(asked, situation)

    def _make_context(self) -> None:
        options = self.options
        assert options.max_sequences and options.kv_cache_tokens and options.kv_cache_type is not None
        ids = sequence_ids(options.max_sequences, options.kv_unified is True)
        params = lib.llama_context_default_params()
        params.n_ctx, params.kv_unified = options.kv_cache_tokens, options.kv_unified
        # Without it layers with a sliding window forget what a shared prefix needs.
        params.swa_full = True
        # llama.cpp aborts the process with fewer outputs than sequences, or more in a step.
        params.n_seq_max, params.n_outputs_max = ids, ids + PROMPT_OUTPUTS
        self.max_outputs = ids + PROMPT_OUTPUTS
        params.n_batch, params.n_ubatch = options.batch_tokens, options.micro_batch_tokens
        flash = options.flash_attention
        params.flash_attn_type = _FLASH_AUTO if flash is None else int(flash)
        params.type_k = params.type_v = _KV_TYPES[options.kv_cache_type][0]
        # A C function that is true while its argument's first byte is not 0: seen
        # from the compute thread without taking the interpreter's lock.
        self._abort_flag = ctypes.create_string_buffer(2)
        self._abort_test = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)
        params.abort_callback = self._abort_test
        params.abort_callback_data = ctypes.addressof(self._abort_flag)
        native_log.errors.clear()
        self._context = lib.llama_init_from_model(self._model, params)
        if self._context is None:
            raise EngineStartFailed("; ".join(native_log.errors) or "llama.cpp gave no context")
        cells = int(lib.llama_n_ctx(self._context))
        self.kv_cache_bytes = int(cells * self._kv_token_bytes(options.kv_cache_type))
        window = lib.llama_model_n_swa(self._model)
        unified = options.kv_unified is True
        # Not of sliding windows: their snapshots cannot be cut. Not from a GPU: the way there is long.
        is_worth = not window and not options.gpu_layers
        room = min(self.kv_cache_bytes, int(host.free_bytes() * SNAPSHOT_SHARE_OF_MEMORY)) if is_worth else 0
        self.kv = KvTraits(ids, cells, unified, not self._is_recurrent, room)
        self._memory = LlamaMemory(self._context, self.kv, window)
        # llama.cpp takes no batch longer than the context.
        effective = LoadOptions(
            batch_tokens=lib.llama_n_batch(self._context),
            micro_batch_tokens=lib.llama_n_ubatch(self._context),
        )
        self.options = effective.over(options)
        self._bind_arrays(lib.llama_n_batch(self._context))

    def _kv_token_bytes(self, kv_type: KvCacheType) -> float:
        """A token's share of a plain KV cache, at most: layers, K and V rows, bytes per value."""
        if lib.llama_model_is_recurrent(self._model):
            return 0.0
        model, arch = self._model, self.info.architecture
        heads = max(1, lib.llama_model_n_head(model))
        head = lib.llama_model_n_embd(model) // heads
        widths = [int(meta(model, f"{arch}.attention.{x}_length") or head) for x in ("key", "value")]
        # llama.cpp tells this of the first layer only, which has none in some hybrid models.
        kv_heads = lib.llama_model_n_head_kv(model) or heads
        row = sum(widths) * kv_heads * _KV_TYPES[kv_type][1]
        return float(lib.llama_model_n_layer(model) * row)

    @property
    def _is_recurrent(self) -> bool:
        """Whether a sequence has a state that cannot be taken back to an earlier token."""
        return bool(lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

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
