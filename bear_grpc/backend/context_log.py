"""What llama.cpp allocates for a context: it tells the sizes in its log only."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..protocol import DeviceUse
from .native import native_log

_MIB = 2**20
_HOST = "CPU"
_KV_LAYER = re.compile(r"llama_kv_cache\S*: layer +\d+: dev = (\S+)")
_KV_SIZE = re.compile(r"llama_kv_cache\S*: size = +([\d.]+) MiB")
_STATES = re.compile(r"llama_memory_recurrent: +(\S+) RS buffer size = +([\d.]+) MiB")
_BUFFER = re.compile(r": +(\S+) +(?:compute|output) buffer size = +([\d.]+) MiB")


@contextmanager
def native_lines() -> Iterator[list[str]]:
    """llama.cpp's texts while the body runs; an outer one gets none of an inner one."""
    before, native_log.lines = native_log.lines, []
    try:
        yield native_log.lines
    finally:
        native_log.lines = before


def device_uses(lines: Sequence[str], states_scale: float = 1.0) -> list[DeviceUse]:
    """Sums by device of a context that was made while the lines came, to a hundredth of a MiB each.

    States of recurrent layers count as KV cache, times `states_scale`.
    """
    kv, compute = collections.defaultdict[str, float](float), collections.defaultdict[str, float](float)
    layers: list[str] = []
    for line in lines:
        if match := _KV_LAYER.search(line):
            layers.append(match[1])
        elif match := _KV_SIZE.search(line):
            # A cache is told as a whole after the devices of its layers.
            for device in layers or [_HOST]:
                kv[device] += float(match[1]) * _MIB / max(1, len(layers))
            layers = []
        elif match := _STATES.search(line):
            kv[_device(match[1])] += float(match[2]) * _MIB * states_scale
        elif match := _BUFFER.search(line):
            compute[_device(match[1])] += float(match[2]) * _MIB
    return [DeviceUse(name, round(kv[name]), round(compute[name])) for name in sorted({*kv, *compute})]


def states_bytes(lines: Sequence[str]) -> float:
    """Of these, the states of recurrent layers."""
    return sum(float(match[2]) for line in lines if (match := _STATES.search(line))) * _MIB


def _device(buffer: str) -> str:
    """Where a buffer of this type is: a GPU's driver has some in the host's memory."""
    return _HOST if buffer.endswith("_Host") or buffer.startswith("CPU_") else buffer
