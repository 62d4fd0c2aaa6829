"""A load without weights: what a model is, and what its context would take.

llama.cpp keeps neither weights nor KV cache of a model that is opened so. What
it does allocate are the states of recurrent layers: of these, only a few are
made and counted for all.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import host
from ..load_plan import sequence_ids
from ..protocol import DryRun
from ..types import MAX_SEQUENCES, LoadOptions, ModelInfo
from .context_log import device_uses, native_lines, states_bytes
from .loading import (
    LOAD_NONE,
    context_params,
    effective_options,
    gpu_layers,
    is_recurrent,
    model_info,
    model_params,
    open_context,
    open_model,
)
from .native import lib

STATE_LIMIT_BYTES = 64 << 20
_LAYER = re.compile(r"load_tensors: layer +\d+ assigned to device (\S+?),")
_MOVED = re.compile(
    r"tensor '.*' \(\S+\) \(and (\d+) others\) cannot be used with preferred buffer type (\S+),"
)


def inspect(path: Path) -> ModelInfo:
    """Reads a model without its weights. Raises as a load would."""
    model = _open(path, LoadOptions(repack=False, gpu_layers=0))
    try:
        return model_info(model)
    finally:
        lib.llama_model_free(model)


def dry_run(path: Path, asked: LoadOptions, *, cores: int) -> DryRun:
    """What a load with these options would take. Raises as the load would; for a process of its own."""
    with native_lines() as model_lines:
        model = _open(path, asked)
        try:
            free_bytes = max(0, host.free_bytes() - _unmapped_bytes(model, asked))
            options = effective_options(model, asked, cores=cores, free_bytes=free_bytes)
            sequences = sequence_ids(options.max_sequences or 1, options.kv_unified is True)
            made = min(sequences, _affordable_states(model, options))
            with native_lines() as context_lines:
                _make_context(model, options, made)
        finally:
            lib.llama_model_free(model)
    moved = next((match for line in model_lines if (match := _MOVED.search(line))), None)
    return DryRun(
        options,
        device_uses(context_lines, sequences / made),
        layer_devices=[match[1] for line in model_lines if (match := _LAYER.search(line))],
        moved_tensors=int(moved[1]) + 1 if moved is not None else None,
    )


def _open(path: Path, asked: LoadOptions) -> object:
    params = model_params(asked)
    params.load_mode, params.no_alloc = LOAD_NONE, True
    return open_model(path, params)


def _unmapped_bytes(model: object, asked: LoadOptions) -> int:
    """Of the host's free memory, what will be gone when a load makes its choice: pages of a file are not."""
    is_copied = asked.mmap is False and gpu_layers(asked) == 0
    return int(lib.llama_model_size(model)) if is_copied else 0


def _make_context(model: object, options: LoadOptions, sequences: int) -> None:
    params = context_params(options)
    params.n_seq_max = sequences
    lib.llama_free(open_context(model, params))


def _affordable_states(model: object, options: LoadOptions) -> int:
    """How many sequences may have their states in a dry run."""
    if not is_recurrent(model):
        return MAX_SEQUENCES
    with native_lines() as lines:
        _make_context(model, options, 1)
    return max(1, int(STATE_LIMIT_BYTES / max(states_bytes(lines), 1.0)))
