"""ServerService: the server about itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from .. import __version__
from ..config import ServerConfig
from ..errors import Draining
from ..executor.probe import probe
from ..executor.spawner import Spawner
from ..input_limits import InputLimits
from ..models.load import LoadMeter, ServerLoad
from ..models.shelf import Shelf
from ..protocol import ProbeResult
from ..types import SandboxState
from ..v1 import server_service_pb2 as pb
from ..v1 import server_service_pb2_grpc as pb_grpc
from .call import current_call
from .ledger import measured, total_of
from .load import GenerationRate, interval_of, load_to_proto
from .status import answer
from .writing import Writer

_KINDS = {
    "cpu": pb.DEVICE_KIND_CPU,
    "gpu": pb.DEVICE_KIND_GPU,
    "igpu": pb.DEVICE_KIND_INTEGRATED_GPU,
    "accel": pb.DEVICE_KIND_ACCELERATOR,
}
_SANDBOX = {
    SandboxState.OFF: pb.SANDBOX_STATE_OFF,
    SandboxState.PARTIAL: pb.SANDBOX_STATE_PARTIAL,
    SandboxState.ON: pb.SANDBOX_STATE_ON,
}
# All that the contract names.
_TOLD_LIMITS = [
    name for name in InputLimits.__struct_fields__ if name in pb.ServerLimits.DESCRIPTOR.fields_by_name
]


class ServerServicer(pb_grpc.ServerServiceServicer):
    """Devices are read by a probe worker at every call: their free memory changes."""

    def __init__(
        self,
        shelf: Shelf,
        spawner: Spawner,
        config: ServerConfig,
        cores: int,
        drain: Callable[[], Awaitable[int]],
        meter: LoadMeter,
        rate: GenerationRate,
    ) -> None:
        """`drain` returns when no new work is taken, with what is still under way."""
        self._shelf = shelf
        self._spawner = spawner
        self._config = config
        self._cores = cores
        self._drain = drain
        self._meter = meter
        self._rate = rate
        self._probing: asyncio.Task[ProbeResult] | None = None

    def reload(self, config: ServerConfig) -> None:
        """Tells these limits from now on."""
        self._config = config

    @answer
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        # Callers at the same time share one probe; one that leaves does not end it.
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(probe(self._spawner))
        found = await asyncio.shield(self._probing)
        devices = [
            pb.Device(
                name=device.name,
                description=device.description,
                kind=_KINDS.get(device.kind, pb.DEVICE_KIND_ACCELERATOR),
                free_bytes=device.free_bytes,
                total_bytes=device.total_bytes,
            )
            for device in found.devices
        ]
        limits = pb.ServerLimits(
            max_waiting_requests=self._config.max_waiting_requests,
            max_waiting_tokens=self._config.max_waiting_tokens,
            **{name: getattr(self._config.limits, name) for name in _TOLD_LIMITS},
        )
        memory = total_of(await measured(self._shelf.list()))
        return pb.GetServerInfoResponse(
            version=__version__,
            llama_cpp_python_version=found.binding_version,
            llama_cpp_build=found.build,
            devices=devices,
            limits=limits,
            sandbox=_SANDBOX[self._spawner.confinement.state],
            sandbox_detail=self._spawner.confinement.detail,
            core_count=self._cores,
            allowed_paths=[str(root) for root in self._shelf.allowed_roots],
            memory=memory,
        )

    @answer
    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(load=self._load_for(await self._meter.read(), context))

    @answer
    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Any) -> None:
        with Writer(context, self._config.stall_timeout_s) as writer:
            async with aclosing(self._meter.every(interval_of(request))) as loads:
                async for load in loads:
                    await writer.write(pb.WatchLoadResponse(load=self._load_for(load, context)))
        raise Draining()  # only the server's stop ends it

    def _load_for(self, load: ServerLoad, context: Any) -> pb.ServerLoad:
        return load_to_proto(load, self._rate.read(), current_call(context).caller)

    @answer
    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        return pb.DrainResponse(remaining_count=await self._drain())
