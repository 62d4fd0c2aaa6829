"""llama.cpp behind the engine's interface. The only importer of llama_cpp.

Return codes, lifetimes and the calls that abort the process are those of
llama.cpp at the version that the pinned llama-cpp-python carries.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from ..errors import EngineStartFailed, InvalidField, ModelFileInvalid, ModelFileNotFound
from ..protocol import DeviceInfo
from ..types import DEFAULT_CONTEXT_LENGTH, KvCacheType, LoadOptions, LoadStage, ModelInfo, SamplingParams
from .base import Batch, Ids, Logits, Outcome

_LOG_WARN, _LOG_ERROR, _LOG_CONT = 3, 4, 5
_ATTR_UNKNOWN, _ATTR_CONTROL = 1, 1 << 3
_LOAD_NONE, _LOAD_MMAP, _LOAD_MLOCK, _LOAD_MMAP_MLOCK = 0, 1, 2, 3
_FLASH_AUTO = -1
# ggml_type and bytes per value: block bytes by block size.
_KV_TYPES = {
    KvCacheType.F16: (1, 2.0),
    KvCacheType.BF16: (30, 2.0),
    KvCacheType.Q8_0: (8, 34 / 32),
    KvCacheType.Q4_0: (2, 18 / 32),
}
_DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}
_OUTCOMES = {0: Outcome.DONE, 1: Outcome.NO_KV_ROOM, 2: Outcome.ABORTED, -1: Outcome.INVALID}
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

Report = Callable[[LoadStage, float], None]

_native: Any = lib  # most of the binding carries no usable annotations


class _NativeLog:
    """Passes llama.cpp's warnings and errors to stderr, and keeps the last errors."""

    def __init__(self) -> None:
        self.errors: collections.deque[str] = collections.deque(maxlen=20)
        self._level = _LOG_ERROR
        # The callback object must live as long as the process.
        self._callback = _native.llama_log_callback(self._take)

    def install(self) -> None:
        _native.llama_log_set(self._callback, None)

    def _take(self, level: int, text: bytes, _data: object) -> None:
        self._level = level if level != _LOG_CONT else self._level
        if self._level in (_LOG_WARN, _LOG_ERROR):
            os.write(2, text)
            if self._level == _LOG_ERROR and text.strip():
                self.errors.append(text.decode(errors="replace").strip())


_log = _NativeLog()


def start() -> None:
    """Once per process, before anything else here."""
    _log.install()
    _native.llama_backend_init()


def describe_build() -> tuple[str, str]:
    """Versions of the binding and of llama.cpp with the features it was compiled with."""
    features = _native.llama_print_system_info().decode().strip()
    return version("llama-cpp-python"), f"{_native.llama_version().decode()} {features}"


def devices() -> list[DeviceInfo]:
    """What llama.cpp can compute on, with memory as it tells it."""
    functions = _native._lib
    get = functions["ggml_backend_dev_get"]
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    texts = []
    for which in ("name", "description"):
        text = functions[f"ggml_backend_dev_{which}"]
        text.restype, text.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        texts.append(text)
    kind = functions["ggml_backend_dev_type"]
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    memory = functions["ggml_backend_dev_memory"]
    memory.restype = None
    memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    found = []
    for place in range(functions["ggml_backend_dev_count"]()):
        device = get(place)
        name, description = (text(device).decode(errors="replace") for text in texts)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        kind_name = _DEVICE_KINDS.get(kind(device), "accel")
        found.append(DeviceInfo(name, description, kind_name, free.value, total.value))
    return found


def _bind_logits() -> Any:
    """The logits getter with a plain address as result: `as_array` on a pointer is slow."""
    getter = _native._lib["llama_get_logits_ith"]
    getter.restype, getter.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int32]
    return getter


def _load(path: Path, params: Any) -> Any:
    if not path.exists():
        raise ModelFileNotFound(str(path))
    _log.errors.clear()
    model = _native.llama_model_load_from_file(os.fsencode(path), params)
    if model is None:
        raise ModelFileInvalid(str(path), _log.errors[0] if _log.errors else "llama.cpp refuses it")
    return model


def inspect(path: Path) -> ModelInfo:
    """Reads a model without its weights (`no_alloc`). Raises as a load would."""
    params = _native.llama_model_default_params()
    params.load_mode, params.no_alloc = _LOAD_NONE, True
    model = _load(path, params)
    try:
        return _model_info(model)
    finally:
        _native.llama_model_free(model)


def _meta(model: Any, key: str) -> str | None:
    """A metadata value as text."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = _native.llama_model_meta_val_str(model, key.encode(), buffer, size)
        if length < 0:
            return None
        if length < size:
            return buffer.value.decode(errors="replace")
        size = length + 1


def _model_info(model: Any) -> ModelInfo:
    buffer = ctypes.create_string_buffer(256)
    _native.llama_model_desc(model, buffer, len(buffer))
    return ModelInfo(
        description=buffer.value.decode(errors="replace"),
        architecture=_meta(model, "general.architecture") or "",
        vocab_size=_native.llama_vocab_n_tokens(_native.llama_model_get_vocab(model)),
        context_length_train=_native.llama_model_n_ctx_train(model),
        parameter_count=_native.llama_model_n_params(model),
        weights_bytes=_native.llama_model_size(model),
        has_chat_template=bool(_native.llama_model_chat_template(model, None)),
    )


class LlamaVocabulary:
    """A model's tokens. Vocabulary calls of llama.cpp are safe from every thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocab = _native.llama_model_get_vocab(model)
        self.size: int = _native.llama_vocab_n_tokens(self._vocab)
        kind = _meta(model, "tokenizer.ggml.model")
        declared = _meta(model, "tokenizer.ggml.add_space_prefix")
        # SentencePiece vocabularies add the space unless they say otherwise.
        self.adds_space_prefix = kind == "llama" and declared != "false"
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._control: frozenset[str] | None = None
        self._eog: frozenset[int] | None = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        capacity = len(data) + 8
        while True:
            ids = np.empty(capacity, np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = _native.llama_tokenize(
                self._vocab, data, len(data), pointer, capacity, add_special, parse_special
            )
            if count >= 0:
                return ids[:count].tolist()
            if count == -(2**31):
                raise InvalidField("text", f"Failed to tokenize prompt: {len(data)} bytes give too many tokens")
            capacity = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        known = self._pieces.get((token, special))
        if known is None:
            known = self._pieces[token, special] = self._read_piece(token, special)
        return known

    def _read_piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.size:  # llama.cpp would end the process
            raise IndexError(f"token {token} of a vocabulary of {self.size}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = _native.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def is_eog(self, token: int) -> bool:
        return token in self._eog_set()

    def eog_tokens(self) -> tuple[int, ...]:
        return tuple(sorted(self._eog_set()))

    def _eog_set(self) -> frozenset[int]:
        if self._eog is None:
            is_eog = _native.llama_vocab_is_eog
            self._eog = frozenset(token for token in range(self.size) if is_eog(self._vocab, token))
        return self._eog

    def control_texts(self) -> frozenset[str]:
        if self._control is None:
            texts = set()
            for token in range(self.size):
                if _native.llama_vocab_get_attr(self._vocab, token) & (_ATTR_CONTROL | _ATTR_UNKNOWN):
                    texts.add(_native.llama_vocab_get_text(self._vocab, token).decode(errors="replace"))
            self._control = frozenset(texts - {""})
        return self._control

    def special_text(self, which: str) -> str:
        token = {"bos": _native.llama_vocab_bos, "eos": _native.llama_vocab_eos}[which](self._vocab)
        return self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    def chat_template(self) -> str | None:
        template = _native.llama_model_chat_template(self._model, None)
        return template.decode(errors="replace") if template else None


class LlamaSampler:
    """A chain of llama.cpp's filters without the draw."""

    def __init__(self, backend: LlamaBackend, params: SamplingParams) -> None:
        self._backend = backend
        self._counts = params.uses_penalties
        self._chain = _native.llama_sampler_chain_init(_native.llama_sampler_chain_default_params())
        for member in self._members(params, backend.vocabulary.size):
            if not member:
                self.close()
                raise EngineStartFailed("a sampler could not be made")
            _native.llama_sampler_chain_add(self._chain, member)

    def _members(self, params: SamplingParams, n_vocab: int) -> Iterator[Any]:
        """In llama-server's order; the bias goes first, while ids are still in order."""
        if params.logit_bias:
            biases = (lib.llama_logit_bias * len(params.logit_bias))(*params.logit_bias)
            yield _native.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)
        if params.uses_penalties:
            window = params.repetition_window
            yield _native.llama_sampler_init_penalties(
                n_vocab,
                self._backend.context_length if window < 0 else window,
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        if params.temperature == 0:
            return
        if params.top_k > 0:
            yield _native.llama_sampler_init_top_k(params.top_k)
        if params.typical_p < 1:
            yield _native.llama_sampler_init_typical(params.typical_p, 1)
        if params.top_p < 1:
            yield _native.llama_sampler_init_top_p(params.top_p, 1)
        if params.min_p > 0:
            yield _native.llama_sampler_init_min_p(params.min_p, 1)
        yield _native.llama_sampler_init_temp(params.temperature)

    def candidates(self, logits: Logits) -> tuple[Ids, Logits]:
        store = self._backend.candidates
        store["id"] = self._backend.all_ids
        store["logit"] = logits
        array = lib.llama_token_data_array()
        array.data = ctypes.cast(store.ctypes.data, lib.llama_token_data_p)
        array.size, array.selected, array.sorted = len(store), -1, False
        _native.llama_sampler_apply(self._chain, ctypes.byref(array))
        # Filters may shrink the array, reorder it, or point it at memory of their own.
        address = ctypes.cast(array.data, ctypes.c_void_p).value
        assert address is not None
        raw = (ctypes.c_char * (array.size * _CANDIDATE.itemsize)).from_address(address)
        left = np.frombuffer(raw, _CANDIDATE)
        return left["id"].copy(), left["logit"].copy()

    def accept(self, token: int) -> None:
        if self._counts:
            _native.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._chain is not None:
            _native.llama_sampler_free(self._chain)
            self._chain = None


class LlamaBackend:
    """A model and its context. See `backend.base.Backend` for threads and meaning."""

    def __init__(self, path: Path, asked: LoadOptions, *, cores: int, report: Report) -> None:
        """Loads; `report` gets the progress on this thread.

        Raises ModelFileNotFound, ModelFileInvalid, InvalidField (a limit that
        only the model tells), EngineStartFailed.
        """
        with contextlib.ExitStack() as undo:
            self._model = self._load_model(path, asked, report)
            undo.callback(_native.llama_model_free, self._model)
            self.info = _model_info(self._model)
            self.vocabulary = LlamaVocabulary(self._model)
            self.options = self._effective(asked, cores)
            assert self.options.context_length is not None
            self.context_length: int = self.options.context_length
            report(LoadStage.CONTEXT, 0.0)
            self._make_context()
            undo.callback(lambda: _native.llama_free(self._context))
            self._threads = 0
            self.set_threads(self.options.threads or cores)
            report(LoadStage.WARMUP, 0.0)
            self._warm_up()
            undo.pop_all()

    def _load_model(self, path: Path, asked: LoadOptions, report: Report) -> Any:
        params = _native.llama_model_default_params()
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

        callback = _native.llama_progress_callback(on_progress)
        params.progress_callback = callback
        return _load(path, params)

    @staticmethod
    def _gpu_layers(asked: LoadOptions) -> int:
        if asked.gpu_layers is not None:
            return asked.gpu_layers
        return -1 if _native.llama_supports_gpu_offload() else 0

    def _effective(self, asked: LoadOptions, cores: int) -> LoadOptions:
        train = self.info.context_length_train
        if asked.context_length is not None and asked.context_length > train:
            limit = f"must be 1 to {train}, the model's own context; is {asked.context_length}"
            raise InvalidField("options.context_length", limit)
        base = LoadOptions(
            context_length=min(DEFAULT_CONTEXT_LENGTH, train),
            max_sequences=1,
            gpu_layers=self._gpu_layers(asked),
            threads=cores,
            batch_tokens=512,
            kv_cache_type=KvCacheType.F16,
            mmap=True,
            mlock=False,
            repack=True,
        )
        options = asked.over(base)
        assert options.batch_tokens and options.max_sequences and options.context_length
        # llama.cpp aborts the process when a batch cannot hold a token of every sequence.
        batch = max(options.batch_tokens, options.max_sequences)
        micro = min(options.micro_batch_tokens or 512, batch)
        pool = LoadOptions(
            kv_cache_tokens=options.context_length * options.max_sequences,
            batch_tokens=batch,
            micro_batch_tokens=micro,
        )
        return pool.over(options)

    def _make_context(self) -> None:
        options = self.options
        assert options.max_sequences and options.kv_cache_type is not None
        params = _native.llama_context_default_params()
        params.n_ctx = options.kv_cache_tokens
        params.n_seq_max = params.n_outputs_max = options.max_sequences
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
        _log.errors.clear()
        self._context = _native.llama_init_from_model(self._model, params)
        if self._context is None:
            raise EngineStartFailed("; ".join(_log.errors) or "llama.cpp gave no context")
        self._memory = _native.llama_get_memory(self._context)
        self.kv_cache_bytes = self._kv_bytes(options.kv_cache_type)
        self._bind_arrays(_native.llama_n_batch(self._context))

    def _kv_bytes(self, kv_type: KvCacheType) -> int:
        """Size of a plain KV cache: cells, layers, K and V rows, bytes per value."""
        model, arch = self._model, self.info.architecture
        heads = max(1, _native.llama_model_n_head(model))
        head = _native.llama_model_n_embd(model) // heads
        widths = [int(_meta(model, f"{arch}.attention.{x}_length") or head) for x in ("key", "value")]
        row = sum(widths) * _native.llama_model_n_head_kv(model) * _KV_TYPES[kv_type][1]
        return int(_native.llama_n_ctx(self._context) * _native.llama_model_n_layer(model) * row)

    def _bind_arrays(self, capacity: int) -> None:
        """Arrays that every step shares: llama.cpp gets the batch by pointers into them."""
        self._get_logits = _bind_logits()
        self._logits_type = ctypes.c_float * self.vocabulary.size
        self.candidates = np.zeros(self.vocabulary.size, _CANDIDATE)
        self.all_ids = np.arange(self.vocabulary.size, dtype=np.int32)
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
        _native.llama_set_warmup(self._context, True)
        outcome = self.forward(batch)
        _native.llama_set_warmup(self._context, False)
        if outcome is not Outcome.DONE:
            raise EngineStartFailed(f"the first step gave {outcome.name}")
        _native.llama_memory_clear(self._memory, True)

    def forward(self, batch: Batch) -> Outcome:
        if self._bound_to is not batch:
            self._bind(batch)
        self._native_batch.n_tokens = batch.size
        code = _native.llama_decode(self._context, self._native_batch)
        return _OUTCOMES.get(code, Outcome.FAILED)

    def logits(self, row: int) -> Logits:
        address = self._get_logits(self._context, row)
        if not address:
            raise IndexError(f"row {row} has no logits")
        return np.frombuffer(self._logits_type.from_address(address), np.float32)

    def make_sampler(self, params: SamplingParams) -> LlamaSampler:
        return LlamaSampler(self, params)

    def kv_length(self, sequence_id: int) -> int:
        return int(_native.llama_memory_seq_pos_max(self._memory, sequence_id)) + 1

    def kv_remove(self, sequence_id: int, start: int) -> bool:
        return bool(_native.llama_memory_seq_rm(self._memory, sequence_id, start, -1))

    def set_threads(self, threads: int) -> None:
        if threads != self._threads:
            self._threads = threads
            _native.llama_set_n_threads(self._context, threads, threads)

    def abort(self) -> None:
        self._abort_flag[0] = b"\x01"

    def clear_abort(self) -> None:
        self._abort_flag[0] = b"\x00"

    def close(self) -> None:
        _native.llama_free(self._context)
        _native.llama_model_free(self._model)
