"""grpc.health.v1 for the server, its services, and every model."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from ..errors import Draining
from ..models.entry import ModelStatus
from ..types import ModelState
from .call import current_call
from .status import answer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Types of it are not stubbed yet.
_ListResponse: Any = health_pb2.HealthListResponse  # type: ignore[attr-defined]
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
LIVENESS = "liveness"
MODEL_PREFIX = "models/"

# A watcher that does not read holds a change up; the others need not wait for it.
SET_TIMEOUT_S = 1.0
LAST_WRITE_S = 0.2


class _Servicer(health_aio.HealthServicer):
    """grpcio's servicer, with watches that the server can end (DRAINING) and names that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = asyncio.Event()

    @answer
    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        watch = asyncio.ensure_future(super().Watch(request, context))
        closed = asyncio.ensure_future(self.closed.wait())
        try:
            await asyncio.wait({watch, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not watch.done():  # let it tell the last change
                await asyncio.wait({watch}, timeout=LAST_WRITE_S)
        finally:
            closed.cancel()
            watch.cancel()
            await asyncio.wait({watch, closed})
        if self.closed.is_set():
            raise Draining()
        if not watch.cancelled():
            watch.result()

    @answer
    async def List(self, request: Any, context: Any) -> Any:
        may_use = current_call(context).caller.may_use
        statuses: dict[str, Any] = self._server_status  # type: ignore[attr-defined]  # as in remove
        shown = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in statuses.items()
            if not name.startswith(MODEL_PREFIX) or may_use(name.removeprefix(MODEL_PREFIX))
        }
        return _ListResponse(statuses=shown)

    async def remove(self, name: str) -> None:
        """Forgets a name: Check answers NOT_FOUND, Watch SERVICE_UNKNOWN."""
        await self.set(name, UNKNOWN)
        # The base knows no removal.
        statuses: dict[str, Any] = self._server_status  # type: ignore[attr-defined]
        statuses.pop(name, None)


class Health:
    """The health servicer and the changes that reach it, in order. Event loop only.

    `""` and the services tell whether this server takes work; `liveness` only
    that its event loop runs; `models/<name>` is SERVING in READY.
    """

    def __init__(self, services: list[str]) -> None:
        self.servicer = _Servicer()
        self._services = ["", *services]
        self._models: set[str] = set()
        self._withdrawn = False
        self._changes: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Everything is NOT_SERVING from here on, liveness is SERVING. Before the server starts."""
        for name in self._services:
            await self.servicer.set(name, NOT_SERVING)
        await self.servicer.set(LIVENESS, SERVING)
        self._task = asyncio.create_task(self._apply())

    async def set_serving(self) -> None:
        """The server takes work; returns when that can be seen."""
        for name in self._services:
            self._changes.put_nowait((name, SERVING))
        await self._changes.join()

    def on_model(self, status: ModelStatus) -> None:
        """A model's status has changed."""
        name = MODEL_PREFIX + status.name
        if not status.is_known:
            self._models.discard(name)
            self._changes.put_nowait((name, None))
            return
        self._models.add(name)
        if status.stage is None and status.pull is None:  # steps of progress change nothing here
            ready = status.state is ModelState.READY and not self._withdrawn
            self._changes.put_nowait((name, SERVING if ready else NOT_SERVING))

    async def withdraw(self) -> None:
        """All but liveness is NOT_SERVING, for good."""
        self._withdrawn = True
        for name in (*self._services, *self._models):
            self._changes.put_nowait((name, NOT_SERVING))
        if self._task is not None:
            await self._changes.join()

    def end_watches(self) -> None:
        """Every watch ends, those to come included."""
        self.servicer.closed.set()

    async def close(self) -> None:
        """Stops applying changes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _apply(self) -> None:
        while True:
            name, status = await self._changes.get()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SET_TIMEOUT_S):
                    if status is None:
                        await self.servicer.remove(name)
                    else:
                        await self.servicer.set(name, status)
            self._changes.task_done()
