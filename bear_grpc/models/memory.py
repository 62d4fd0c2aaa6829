"""What a load takes of each device's memory, and whether it fits.

From a header alone, which may be that of a file elsewhere; from a dry run too where there is one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..load_plan import Situation, choose
from ..protocol import DeviceInfo, DryRun
from ..types import KvCacheType, LoadOptions
from .gguf_types import ArraySummary, GgufHeader
from .sizes import ModelSizes
from .weights import HOST, lay_out

ALL_LAYERS = -1
# Of a worker without its model, as measured on Linux: interpreter, numpy and llama.cpp with what they keep
# (24 MiB where other processes share the libraries' pages, 40 MiB where none does), then each token of a
# vocabulary, and each pair of a BPE tokenizer.
WORKER_BYTES, TOKEN_BYTES, MERGE_BYTES = 32 << 20, 128, 78
# On a GPU: what its driver keeps for a process, and the part of the free memory that is left to others.
GPU_CONTEXT_BYTES, GPU_MARGIN = 512 << 20, 0.05


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """Bytes on one device, and what is free there. States of recurrent layers count as KV cache.

    `reclaimable_bytes` of the weights are pages of the file that nothing reads after the load: they
    count in the worker's memory, and go when somebody needs the room.
    """

    device: str
    weights_bytes: int
    kv_cache_bytes: int
    compute_bytes: int
    overhead_bytes: int
    free_bytes: int
    reclaimable_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """All of it: what the worker's proportional set size will be, on the host."""
        return self.weights_bytes + self.kv_cache_bytes + self.compute_bytes + self.overhead_bytes

    @property
    def lasting_bytes(self) -> int:
        """What nobody can take back: this must fit."""
        return self.needed_bytes - self.reclaimable_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a load takes, the host first, with the options that it would have."""

    devices: tuple[DeviceNeed, ...]
    options: LoadOptions
    fits: bool


def plan(
    header: GgufHeader,
    asked: LoadOptions,
    devices: Sequence[DeviceInfo],
    *,
    cores: int,
    dry_run: DryRun | None = None,
) -> MemoryPlan:
    """What a load with these options takes, against the free memory that `devices` tell.

    What was left open is chosen as the worker does it; of the layers as many are on GPUs as fit, all
    with the output if all do. `dry_run` must be one of this file with these options; its GPU layers are
    then the plan's. Without it formulas take its place, which know the usual architectures.

    Raises InvalidField for options that cannot be together, ModelFileInvalid for a header that lacks
    what no model is loaded without.
    """
    sizes = ModelSizes(header)
    host = next((device for device in devices if device.kind == "cpu"), None)
    gpus = _gpus(devices)
    load = _Load(sizes, asked, host or DeviceInfo(HOST, "", "cpu", 0, 0), gpus, cores, dry_run)
    if dry_run is not None:
        return load.plan(dry_run.options.gpu_layers or 0)
    if not gpus or asked.gpu_layers is not None:
        return load.plan(asked.gpu_layers or 0)
    return load.plan_most_layers()


def overhead_bytes(header: GgufHeader) -> int:
    """What the worker's process takes beside the model's weights and its context."""
    merges = header.metadata.get("tokenizer.ggml.merges")
    pairs = merges.count if isinstance(merges, ArraySummary) else 0
    return WORKER_BYTES + TOKEN_BYTES * (header.vocabulary_size or 0) + MERGE_BYTES * pairs


@dataclass(frozen=True, slots=True)
class _Load:
    """A load of one model on one machine, for any number of layers on its GPUs."""

    sizes: ModelSizes
    asked: LoadOptions
    host: DeviceInfo
    gpus: Sequence[DeviceInfo]
    cores: int
    dry_run: DryRun | None

    def plan(self, gpu_layers: int) -> MemoryPlan:
        places = self._places(gpu_layers)
        weights = lay_out(self.sizes, places, self.asked, self.dry_run)
        options = self._options(gpu_layers, weights.copied_bytes)
        kv, compute = self._context(options, places)
        needs = []
        for name, device in ((HOST, self.host), *((gpu.name, gpu) for gpu in self.gpus)):
            is_host = device is self.host
            held = weights.by_device.get(name, 0) + kv.get(name, 0)
            needs.append(
                DeviceNeed(
                    device.name,
                    weights.by_device.get(name, 0),
                    kv.get(name, 0),
                    compute.get(name, 0),
                    overhead_bytes(self.sizes.header) if is_host else GPU_CONTEXT_BYTES * (held > 0),
                    device.free_bytes,
                    weights.reclaimable_bytes if is_host else 0,
                )
            )
        fits = all(need.lasting_bytes <= need.free_bytes for need in needs)
        return MemoryPlan(tuple(needs), options, fits)

    def plan_most_layers(self) -> MemoryPlan:
        """With as many layers on the GPUs as fit there."""
        best, fewest, most = self.plan(ALL_LAYERS), 0, self.sizes.layers + 1
        if self._has_room(best):
            return best
        best = self.plan(0)
        while most - fewest > 1:
            layers = (fewest + most) // 2
            found = self.plan(layers)
            if self._has_room(found):
                best, fewest = found, layers
            else:
                most = layers
        return best

    @staticmethod
    def _has_room(found: MemoryPlan) -> bool:
        return all(need.lasting_bytes <= need.free_bytes * (1 - GPU_MARGIN) for need in found.devices[1:])

    def _places(self, gpu_layers: int) -> list[str]:
        """The device of every layer and of the output, as llama.cpp spreads them: the last ones on GPUs."""
        count = self.sizes.layers + 1
        if self.dry_run is not None and len(self.dry_run.layer_devices) == count:
            return self.dry_run.layer_devices
        moved = count if gpu_layers == ALL_LAYERS else min(gpu_layers, count)
        if not self.gpus or moved == 0:
            return [HOST] * count
        sums = list(itertools.accumulate(max(1, gpu.free_bytes) for gpu in self.gpus))
        shares = [bisect.bisect_right(sums, sums[-1] * index / moved) for index in range(moved)]
        return [HOST] * (count - moved) + [self.gpus[share].name for share in shares]

    def _options(self, gpu_layers: int, copied_bytes: int) -> LoadOptions:
        if self.dry_run is not None:
            return self.dry_run.options
        situation = Situation(
            context_length_train=self.sizes.context_length_train,
            cores=self.cores,
            gpu_layers=gpu_layers,
            # The worker looks when the weights are in; pages of the file still count as free.
            free_bytes=max(0, self.host.free_bytes - copied_bytes),
            kv_token_bytes={kind: self.sizes.kv_token_bound(kind) for kind in KvCacheType},
            can_share_ids=self.sizes.can_share_ids,
            head_widths=self.sizes.head_widths,
        )
        return choose(self.asked, situation)

    def _context(self, options: LoadOptions, places: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by device of KV cache and of compute buffers."""
        if self.dry_run is not None:
            uses = self.dry_run.devices
            return (
                {use.device: use.kv_cache_bytes for use in uses},
                {use.device: use.compute_bytes for use in uses},
            )
        kv: dict[str, int] = {}
        for place, size in zip(places, self.sizes.kv_bytes(options), strict=False):
            kv[place] = kv.get(place, 0) + round(size)
        return kv, dict.fromkeys({HOST, *places}, self.sizes.compute_bytes(options))


def _gpus(devices: Sequence[DeviceInfo]) -> list[DeviceInfo]:
    """Those that llama.cpp computes on: ones that share the host's memory only if there are no others."""
    of_kind = {kind: [device for device in devices if device.kind == kind] for kind in ("gpu", "igpu")}
    return of_kind["gpu"] or of_kind["igpu"]
