"""How a model and its context are asked of llama.cpp: for a load, and for the dry run of one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from ..errors import EngineStartFailed, ModelFileInvalid, ModelFileNotFound
from ..load_plan import KV_VALUE_BYTES, PROMPT_OUTPUTS, Situation, choose, sequence_ids
from ..types import KvCacheType, LoadOptions, ModelInfo
from .native import lib, meta, native_log

LOAD_NONE, LOAD_MMAP, LOAD_MLOCK, LOAD_MMAP_MLOCK = 0, 1, 2, 3
_FLASH_AUTO = -1
# ggml_type
_KV_TYPES = {KvCacheType.F16: 1, KvCacheType.BF16: 30, KvCacheType.Q8_0: 8, KvCacheType.Q4_0: 2}


def model_params(asked: LoadOptions) -> Any:
    """llama.cpp's parameters for weights that are read as asked for."""
    params = lib.llama_model_default_params()
    mmap, mlock = asked.mmap is not False, asked.mlock is True
    params.load_mode = {
        (False, False): LOAD_NONE,
        (True, False): LOAD_MMAP,
        (False, True): LOAD_MLOCK,
        (True, True): LOAD_MMAP_MLOCK,
    }[mmap, mlock]
    params.use_extra_bufts = asked.repack is not False
    params.n_gpu_layers = gpu_layers(asked)
    return params


def gpu_layers(asked: LoadOptions) -> int:
    """Layers on a GPU, -1 for all of them."""
    if asked.gpu_layers is not None:
        return asked.gpu_layers
    return -1 if lib.llama_supports_gpu_offload() else 0


def open_model(path: Path, params: Any) -> Any:
    """A model, which the caller frees. Raises ModelFileNotFound, ModelFileInvalid."""
    if not path.exists():
        raise ModelFileNotFound(str(path))
    native_log.errors.clear()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if model is None:
        raise ModelFileInvalid(
            str(path), native_log.errors[0] if native_log.errors else "llama.cpp refuses it"
        )
    return model


def model_info(model: Any) -> ModelInfo:
    """What llama.cpp tells of a model, be its weights there or not."""
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


def is_recurrent(model: Any) -> bool:
    """Whether a sequence has a state that cannot be taken back to an earlier token."""
    return bool(lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model))


def kv_token_bytes(model: Any, kv_type: KvCacheType) -> float:
    """A token's share of a plain KV cache, at most: layers, K and V rows, bytes per value."""
    if lib.llama_model_is_recurrent(model):
        return 0.0
    heads = max(1, lib.llama_model_n_head(model))
    # llama.cpp tells this of the first layer only, which has none in some hybrid models.
    kv_heads = lib.llama_model_n_head_kv(model) or heads
    row = sum(head_widths(model)) * kv_heads * KV_VALUE_BYTES[kv_type]
    return float(lib.llama_model_n_layer(model) * row)


def head_widths(model: Any) -> tuple[int, ...]:
    """Values of a head's key and of its value; none of a model without attention."""
    if lib.llama_model_is_recurrent(model):
        return ()
    arch = meta(model, "general.architecture")
    head = lib.llama_model_n_embd(model) // max(1, lib.llama_model_n_head(model))
    return tuple(int(meta(model, f"{arch}.attention.{part}_length") or head) for part in ("key", "value"))


def effective_options(model: Any, asked: LoadOptions, *, cores: int, free_bytes: int) -> LoadOptions:
    """The options in force. A state of recurrent models is too big to be kept beyond what runs.

    Raises InvalidField for a limit that only the model tells.
    """
    situation = Situation(
        context_length_train=lib.llama_model_n_ctx_train(model),
        cores=cores,
        gpu_layers=gpu_layers(asked),
        free_bytes=free_bytes,
        kv_token_bytes={kind: kv_token_bytes(model, kind) for kind in KvCacheType},
        can_share_ids=not is_recurrent(model),
        head_widths=head_widths(model),
    )
    return choose(asked, situation)


def context_params(options: LoadOptions) -> Any:
    """llama.cpp's parameters for a context with these effective options."""
    assert options.max_sequences and options.kv_cache_tokens and options.kv_cache_type is not None
    ids = sequence_ids(options.max_sequences, options.kv_unified is True)
    params = lib.llama_context_default_params()
    params.n_ctx, params.kv_unified = options.kv_cache_tokens, options.kv_unified
    # Without it layers with a sliding window forget what a shared prefix needs.
    params.swa_full = True
    # llama.cpp aborts the process with fewer outputs than sequences, or more in a step.
    params.n_seq_max, params.n_outputs_max = ids, ids + PROMPT_OUTPUTS
    params.n_batch, params.n_ubatch = options.batch_tokens, options.micro_batch_tokens
    flash = options.flash_attention
    params.flash_attn_type = _FLASH_AUTO if flash is None else int(flash)
    params.type_k = params.type_v = _KV_TYPES[options.kv_cache_type]
    return params


def open_context(model: Any, params: Any) -> Any:
    """A context, which the caller frees before the model. Raises EngineStartFailed."""
    native_log.errors.clear()
    context = lib.llama_init_from_model(model, params)
    if context is None:
        raise EngineStartFailed("; ".join(native_log.errors) or "llama.cpp gave no context")
    return context
