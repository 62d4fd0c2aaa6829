"""grpc.health.v1 for the server, its services, and every model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..errors import Draining, InvalidField
from ..models.entry import ModelStatus
from ..types import ModelState
from .call import current_call
from .open_streams import OpenStreams
from .status import abort_not_found, answer
from .writing import Writer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
# Types of it are not stubbed yet.
_ListResponse: Any = health_pb2.HealthListResponse  # type: ignore[attr-defined]
LIVENESS = "liveness"
MODEL_PREFIX = "models/"

# A watch costs some 30 kB and, until something changes, no time; a change wakes those of its name.
MAX_WATCHES = 1024
# A watch holds its request for as long as it lasts, and anybody may open one.
MAX_NAME_BYTES = 1024


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Statuses by name, and the watches on them. Event loop only.

    A status counts at once. Each watch then tells the newest one that it has not told, by itself: none waits
    for another's reader.
    """

    def __init__(self, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._statuses: dict[str, int] = {}
        self._watches: dict[str, set[asyncio.Event]] = {}
        self._open = OpenStreams(MAX_WATCHES)
        self._is_ending = False

    def set(self, name: str, status: int) -> None:
        """Check and Watch tell this from now on."""
        self._statuses[name] = status
        self._wake(name)

    def remove(self, name: str) -> None:
        """Forgets a name: Check answers NOT_FOUND, Watch SERVICE_UNKNOWN."""
        self._statuses.pop(name, None)
        self._wake(name)

    def end_watches(self) -> None:
        """Every watch tells its last status and ends with DRAINING, those to come included."""
        self._is_ending = True
        for name in self._watches:
            self._wake(name)

    @answer
    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        status = self._statuses.get(request.service)
        if status is None:
            await abort_not_found(context)
        return health_pb2.HealthCheckResponse(status=status)

    @answer
    async def List(self, request: Any, context: Any) -> Any:
        may_use = current_call(context).caller.may_use
        shown = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._statuses.items()
            if not name.startswith(MODEL_PREFIX) or may_use(name.removeprefix(MODEL_PREFIX))
        }
        return _ListResponse(statuses=shown)

    @answer
    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        if len(request.service.encode()) > MAX_NAME_BYTES:
            raise InvalidField("service", f"must be {MAX_NAME_BYTES} bytes at most")
        with self._open.one(current_call(context).caller.tenant):
            await self._watch(request.service, context)

    @answer  # inside of its place: a stream is open until its status has been taken
    async def _watch(self, name: str, context: Any) -> None:
        # With the first message, which may never be read, gRPC would not know that they are sent.
        await context.send_initial_metadata(())
        with self._changes(name) as changed, Writer(context, self._stall_timeout_s) as writer:
            told: int | None = None
            while True:
                changed.clear()
                status = self._statuses.get(name, UNKNOWN)
                if status != told:
                    await writer.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                elif self._is_ending:
                    raise Draining()
                else:
                    await changed.wait()

    @contextlib.contextmanager
    def _changes(self, name: str) -> Iterator[asyncio.Event]:
        """Is set when there may be something new to tell of a name."""
        changed = asyncio.Event()
        watches = self._watches.setdefault(name, set())
        watches.add(changed)
        try:
            yield changed
        finally:
            watches.discard(changed)
            if not watches:
                del self._watches[name]

    def _wake(self, name: str) -> None:
        for changed in self._watches.get(name, ()):
            changed.set()


class Health:
    """What the health servicer tells of this server. Event loop only.

    `""` and the services tell whether this server takes work; `liveness` only
    that its event loop runs; `models/<name>` is SERVING in READY.
    """

    def __init__(self, services: list[str], stall_timeout_s: float) -> None:
        """Everything is NOT_SERVING, liveness is SERVING."""
        self.servicer = HealthServicer(stall_timeout_s)
        self._services = ["", *services]
        self._models: set[str] = set()
        self._is_withdrawn = False
        self._set(self._services, NOT_SERVING)
        self.servicer.set(LIVENESS, SERVING)

    def set_serving(self) -> None:
        """The server takes work, unless it has been withdrawn meanwhile."""
        if not self._is_withdrawn:
            self._set(self._services, SERVING)

    def on_model(self, status: ModelStatus) -> None:
        """A model's status has changed."""
        name = MODEL_PREFIX + status.name
        if not status.is_known:
            self._models.discard(name)
            self.servicer.remove(name)
            return
        self._models.add(name)
        if status.stage is None and status.pull is None:  # steps of progress change nothing here
            ready = status.state is ModelState.READY and not self._is_withdrawn
            self.servicer.set(name, SERVING if ready else NOT_SERVING)

    def withdraw(self) -> None:
        """All but liveness is NOT_SERVING, for good."""
        self._is_withdrawn = True
        self._set([*self._services, *self._models], NOT_SERVING)

    def end_watches(self) -> None:
        """Every watch ends, those to come included."""
        self.servicer.end_watches()

    def _set(self, names: list[str], status: int) -> None:
        for name in names:
            self.servicer.set(name, status)
