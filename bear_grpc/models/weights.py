"""Where the weights of a model lie when it is loaded: by device, mapped from the file or copied."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..protocol import DryRun
from ..types import LoadOptions
from .gguf_types import TensorInfo
from .sizes import INPUT, ModelSizes

HOST = "CPU"
# What ggml rearranges for its kernels, by machine. Some CPUs of a kind take fewer types: a dry run knows.
_X86 = frozenset(("Q2_K", "Q4_0", "Q4_K", "IQ4_NL", "MXFP4"))
_ARM = frozenset(("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"))
_REPACKED = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
_REPACKED_ROWS = 8
_PLAIN = frozenset(("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"))


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of weights by device. Of the host's, `copied_bytes` are no pages of the file.

    `reclaimable_bytes` are pages of the file that nothing reads after the load: llama.cpp keeps all
    mapped from the first to the last tensor that it uses in place, also what it has copied.
    """

    by_device: dict[str, int]
    copied_bytes: int
    reclaimable_bytes: int


def lay_out(
    sizes: ModelSizes, places: Sequence[str], asked: LoadOptions, dry_run: DryRun | None = None
) -> Weights:
    """The weights with their layers on these devices, the output's last."""
    by_device: dict[str, int] = {HOST: 0}
    on_host: list[TensorInfo] = []
    for tensor in sizes.header.tensors:
        layer = sizes.layer_of(tensor)
        device = HOST if layer == INPUT else places[layer]
        if device == HOST:
            on_host.append(tensor)
        else:
            by_device[device] = by_device.get(device, 0) + tensor.byte_count
    copy = sizes.output_copy()
    if copy is not None and places[-1] != HOST:
        by_device[places[-1]] = by_device.get(places[-1], 0) + copy.byte_count
    repacked = _repacked(sizes, on_host, places, dry_run) if asked.repack is not False else []
    repacked_bytes = sum(tensor.byte_count for tensor in repacked)
    if asked.mmap is False:
        twice = copy.byte_count if copy is not None and copy in repacked else 0
        by_device[HOST] = copied = sum(tensor.byte_count for tensor in on_host) + twice
        return Weights(by_device, copied, 0)
    in_place = {tensor.name for tensor in on_host} - {
        tensor.name for tensor in repacked if tensor is not copy
    }
    mapped, used = 0, 0
    for part in _parts(sizes.header.tensors):
        kept = [tensor for tensor in part if tensor.name in in_place]
        if kept:
            mapped += kept[-1].offset + kept[-1].byte_count - kept[0].offset
            used += sum(tensor.byte_count for tensor in kept)
    by_device[HOST] = mapped + repacked_bytes
    return Weights(by_device, repacked_bytes, mapped - used)


def _parts(tensors: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """The tensors of each file: offsets begin anew in every one."""
    part: list[TensorInfo] = []
    for tensor in tensors:
        if part and tensor.offset <= part[-1].offset:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part


def _repacked(
    sizes: ModelSizes, on_host: Sequence[TensorInfo], places: Sequence[str], dry_run: DryRun | None
) -> list[TensorInfo]:
    """Tensors of the host that are copied for its kernels; of tied embeddings, the output is one more."""
    copy = sizes.output_copy() if places[-1] == HOST else None
    able = [tensor for tensor in on_host if sizes.layer_of(tensor) != INPUT and _is_able(tensor)]
    if copy is not None and _is_able(copy):
        able.append(copy)
    types = _REPACKED.get(platform.machine(), frozenset())
    if dry_run is not None and all(place == HOST for place in places):
        if dry_run.moved_tensors is None:
            return []
        created = len(sizes.header.tensors) + (copy is not None)
        types = _types_of(able, created - dry_run.moved_tensors, types)
    return [tensor for tensor in able if tensor.type in types]


def _is_able(tensor: TensorInfo) -> bool:
    is_matrix = len(tensor.shape) > 1 and tensor.shape[1] % _REPACKED_ROWS == 0
    return is_matrix and tensor.type not in _PLAIN


def _types_of(able: Sequence[TensorInfo], count: int, usual: frozenset[str]) -> frozenset[str]:
    """The types that so many of the tensors have together; the usual ones, if these are or none are."""
    counts = {kind: sum(tensor.type == kind for tensor in able) for kind in {tensor.type for tensor in able}}
    present = usual & counts.keys()
    if sum(counts[kind] for kind in present) == count:
        return present
    others = sorted(counts)[:8]
    for size in range(len(others) + 1):
        for kinds in itertools.combinations(others, size):
            if sum(counts[kind] for kind in kinds) == count:
                return frozenset(kinds)
    return present
