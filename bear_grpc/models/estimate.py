"""What a load would take: a plan by the model's header, and by a dry run where it may matter."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

from .. import host
from ..errors import ModelFileInvalid
from ..executor.probe import probe
from ..executor.spawner import Spawner
from ..protocol import DeviceInfo
from ..types import LoadOptions
from .entry import ModelEntry, header_of
from .eviction import Need
from .gguf_types import GgufHeader
from .memory import MemoryPlan, plan
from .weights import HOST

# Formulas are within some percent: below and above these shares of the free memory no dry run is needed.
SURE_SHARE, HOPELESS_SHARE = 0.5, 2.0
# Above it a dry run takes much memory itself: llama.cpp keeps 48 bytes for each cell.
MAX_DRY_TOKENS = 2**22
# Each is a process of its own.
MAX_PROBES = 2
# Parts of llama.cpp that compute on no other device than the host's.
_HOST_BACKENDS = ("ggml", "ggml-base", "ggml-cpu", "ggml-blas", "llama", "mtmd")


class Estimator:
    """Event loop only; dry runs are made by probe workers."""

    def __init__(self, *, spawner: Spawner, cores: int) -> None:
        self._spawner = spawner
        self._cores = cores
        self._has_gpu_backend = has_gpu_backend()
        self._turn = asyncio.Semaphore(MAX_PROBES)

    async def estimate(self, entry: ModelEntry, options: LoadOptions) -> MemoryPlan:
        """What a load of this model with these options would take now, on every device.

        A file that is here is run dry; of one on the hub only, formulas tell. Raises what a load would.
        """
        asked = options.over(entry.load_options)
        if entry.path is not None:
            header = await asyncio.to_thread(header_of, entry.path)
            quick = self._quick(header, asked)
            if quick is not None and _is_beyond(quick):
                return quick
            return await self._by_dry_run(entry.path, header, asked)
        assert entry.header is not None
        async with self._turn:
            found = await probe(self._spawner)
        return plan(entry.header, asked, found.devices, cores=self._cores)

    async def need(self, entry: ModelEntry, asked: LoadOptions) -> Need:
        """What a load takes of the host's memory, and how many layers go to a GPU. Raises as `estimate`."""
        header = entry.header
        assert header is not None
        if not self._has_gpu_backend:
            quick = self._quick(header, asked)
            if quick is None:
                return Need(header.file_bytes, host.free_bytes())
            if _share(quick) <= SURE_SHARE or _is_beyond(quick):
                return Need(quick.devices[0].lasting_bytes, quick.devices[0].free_bytes)
        found = await self._by_dry_run(entry.file, header, asked)
        own = found.devices[0]
        layers = found.options.gpu_layers if self._has_gpu_backend else None
        return Need(own.lasting_bytes, own.free_bytes, layers)

    def _quick(self, header: GgufHeader, asked: LoadOptions) -> MemoryPlan | None:
        """By formulas, on the host alone; None: llama.cpp knows more architectures, it is the judge."""
        free = host.free_bytes()
        try:
            return plan(header, asked, [DeviceInfo(HOST, "", "cpu", free, free)], cores=self._cores)
        except ModelFileInvalid:
            return None

    async def _by_dry_run(self, path: Path, header: GgufHeader, asked: LoadOptions) -> MemoryPlan:
        async with self._turn:
            return await self._probed(path, header, asked)

    async def _probed(self, path: Path, header: GgufHeader, asked: LoadOptions) -> MemoryPlan:
        if self._has_gpu_backend and asked.gpu_layers is None:
            # As many layers as fit, by formulas: the dry run then tells of exactly these.
            devices = (await probe(self._spawner)).devices
            first = plan(header, asked, devices, cores=self._cores)
            asked = LoadOptions(gpu_layers=first.options.gpu_layers).over(asked)
        found = await probe(self._spawner, path, asked, self._cores)
        return plan(header, asked, found.devices, cores=self._cores, dry_run=found.dry_run)


def _share(found: MemoryPlan) -> float:
    """Of the host's free memory."""
    own = found.devices[0]
    return own.lasting_bytes / max(1, own.free_bytes)


def _is_beyond(found: MemoryPlan) -> bool:
    """Whether a dry run would tell nothing more, or take too much itself."""
    return _share(found) >= HOPELESS_SHARE or (found.options.kv_cache_tokens or 0) > MAX_DRY_TOKENS


def has_gpu_backend() -> bool:
    """Whether the installed llama.cpp has a part for another device than the host; it is not loaded."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec is not None else None
    names = {
        file.name.split(".")[0].removeprefix("lib")
        for folder in folders or ()
        for file in (Path(folder) / "lib").glob("*ggml-*")
    }
    return bool(names - set(_HOST_BACKENDS))
