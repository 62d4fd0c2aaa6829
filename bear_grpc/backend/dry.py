"""A load without weights: what a model is, and what its context would take.

llama.cpp keeps neither weights nor KV cache of a model that is opened so, and
tells the sizes in its log only. What it does allocate are the states of
recurrent layers: of these, only a few are made and counted for all.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import host
from ..load_plan import sequence_ids
from ..protocol import DeviceUse, DryRun
from ..types import MAX_SEQUENCES, LoadOptions, ModelInfo
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
from .native import lib, native_log

STATE_LIMIT_BYTES = 64 << 20
_MIB = 2**20
_HOST = "CPU"
_LAYER = re.compile(r"load_tensors: layer +\d+ assigned to device (\S+?),")
_KV_LAYER = re.compile(r"llama_kv_cache\S*: layer +\d+: dev = (\S+)")
_KV_SIZE = re.compile(r"llama_kv_cache\S*: size = +([\d.]+) MiB")
_STATES = re.compile(r"llama_memory_recurrent: +(\S+) RS buffer size = +([\d.]+) MiB")
_BUFFER = re.compile(r": +(\S+) +(?:compute|output) buffer size = +([\d.]+) MiB")
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
    with _log() as model_lines:
        model = _open(path, asked)
        try:
            free_bytes = max(0, host.free_bytes() - _unmapped_bytes(model, asked))
            options = effective_options(model, asked, cores=cores, free_bytes=free_bytes)
            sequences = sequence_ids(options.max_sequences or 1, options.kv_unified is True)
            made = min(sequences, _affordable_states(model, options))
            with _log() as context_lines:
                _make_context(model, options, made)
        finally:
            lib.llama_model_free(model)
    moved = next((match for line in model_lines if (match := _MOVED.search(line))), None)
    return DryRun(
        options,
        _uses(context_lines, sequences / made),
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
    with _log() as lines:
        _make_context(model, options, 1)
    one = sum(float(match[2]) for line in lines if (match := _STATES.search(line))) * _MIB
    return max(1, int(STATE_LIMIT_BYTES / max(one, 1.0)))


def _uses(lines: list[str], scale: float) -> list[DeviceUse]:
    """Sums by device. A cache is told as a whole after the devices of its layers."""
    kv, compute = collections.defaultdict[str, float](float), collections.defaultdict[str, float](float)
    layers: list[str] = []
    for line in lines:
        if match := _KV_LAYER.search(line):
            layers.append(match[1])
        elif match := _KV_SIZE.search(line):
            for device in layers or [_HOST]:
                kv[device] += float(match[1]) * _MIB / max(1, len(layers))
            layers = []
        elif match := _STATES.search(line):
            kv[_device(match[1])] += float(match[2]) * _MIB * scale
        elif match := _BUFFER.search(line):
            compute[_device(match[1])] += float(match[2]) * _MIB
    return [DeviceUse(name, round(kv[name]), round(compute[name])) for name in sorted({*kv, *compute})]


def _device(buffer: str) -> str:
    """Where a buffer of this type is: a GPU's driver has some in the host's memory."""
    return _HOST if buffer.endswith("_Host") or buffer.startswith("CPU_") else buffer


@contextmanager
def _log() -> Iterator[list[str]]:
    """llama.cpp's texts while the body runs; an outer one gets none of an inner one."""
    before, native_log.lines = native_log.lines, []
    try:
        yield native_log.lines
    finally:
        native_log.lines = before
