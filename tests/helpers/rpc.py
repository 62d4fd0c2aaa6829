"""What tests of a running server share: stubs, streams as lists, statuses taken apart, bounded waits."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.rpc import error_details_pb2 as details_pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from bear_grpc.client import requests
from bear_grpc.client.options import GenerateOptions
from bear_grpc.config import ServerConfig
from bear_grpc.executor.spawner import Spawner
from bear_grpc.server import Server
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import inference_service_pb2_grpc as inference_grpc
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import model_service_pb2_grpc as models_grpc
from bear_grpc.v1 import server_service_pb2_grpc as server_grpc
from bear_grpc.v1 import types_pb2 as pb

# Never waited for in full, but by a test that fails.
WAIT_S = 30.0
Code = grpc.StatusCode
T = TypeVar("T")


async def collect(call: Any) -> list[Any]:
    """What is left of a stream that ends by itself with OK."""
    seen: list[Any] = []
    async with asyncio.timeout(WAIT_S):
        while (message := await call.read()) is not grpc.aio.EOF:
            seen.append(message)
    return seen


async def eventually(check: Callable[[], Awaitable[T]], timeout_s: float = WAIT_S) -> T:
    """The first true value of `check`, asked again and again."""
    async with asyncio.timeout(timeout_s):
        while True:
            value = await check()
            if value:
                return value
            await asyncio.sleep(0.01)


@dataclasses.dataclass(slots=True, frozen=True)
class StatusDetails:
    """The details of a status; what it does not have is None."""

    metadata: Mapping[str, str]
    message: str
    bad_request: details_pb.BadRequest | None
    retry: details_pb.RetryInfo | None
    resource: details_pb.ResourceInfo | None
    precondition: details_pb.PreconditionFailure | None
    quota: details_pb.QuotaFailure | None

    @property
    def fields(self) -> list[str]:
        """The fields that a BadRequest names."""
        return [] if self.bad_request is None else [v.field for v in self.bad_request.field_violations]


def assert_status(exc: BaseException, code: grpc.StatusCode, reason: str) -> StatusDetails:
    """Checks a failed call's code and ErrorInfo; gives the rest of its details."""
    assert isinstance(exc, grpc.RpcError), repr(exc)
    assert exc.code() is code, f"{exc.code()}: {exc.details()}"  # type: ignore[attr-defined]
    status = rpc_status.from_call(exc)  # type: ignore[arg-type]
    assert status is not None, f"no details: {exc.details()}"  # type: ignore[attr-defined]

    def take(kind: type[Any]) -> Any:
        message = kind()
        found = [detail for detail in status.details if detail.Is(kind.DESCRIPTOR)]
        assert len(found) <= 1, f"{kind.__name__} twice"
        return message if found and found[0].Unpack(message) else None

    info = take(details_pb.ErrorInfo)
    assert info is not None, status
    assert (info.domain, info.reason) == ("bear_grpc", reason), status
    return StatusDetails(
        dict(info.metadata),
        status.message,
        take(details_pb.BadRequest),
        take(details_pb.RetryInfo),
        take(details_pb.ResourceInfo),
        take(details_pb.PreconditionFailure),
        take(details_pb.QuotaFailure),
    )


async def fails(call: Awaitable[Any], code: grpc.StatusCode, reason: str) -> StatusDetails:
    """Awaits a unary call that must fail with this status."""
    try:
        async with asyncio.timeout(WAIT_S):
            answer = await call
    except grpc.RpcError as exc:
        return assert_status(exc, code, reason)
    raise AssertionError(f"no error but {answer}")


async def stream_fails(call: Any, code: grpc.StatusCode, reason: str) -> tuple[list[Any], StatusDetails]:
    """Reads a stream that must end with this status; gives what came before it."""
    seen: list[Any] = []
    try:
        async with asyncio.timeout(WAIT_S):
            while (message := await call.read()) is not grpc.aio.EOF:
                seen.append(message)
    except grpc.RpcError as exc:
        return seen, assert_status(exc, code, reason)
    raise AssertionError(f"the stream ended OK after {seen[-1:]}")


def ask(
    model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]
) -> inference_pb.GenerateRequest:
    """A GenerateRequest; without any input the prompt is `hello`."""
    if prompt is None and not options.keys() & {"messages", "token_ids"}:
        prompt = "hello"
    return requests.generate(model, prompt, options)


def text_of(events: list[inference_pb.GenerateResponse]) -> str:
    """The text of a generation."""
    return "".join(event.delta.text for event in events)


def kinds(events: list[inference_pb.GenerateResponse]) -> list[str]:
    """The events' names, a run of deltas as one."""
    found: list[str] = []
    for event in events:
        kind = event.WhichOneof("event") or ""
        if kind != "delta" or found[-1:] != ["delta"]:
            found.append(kind)
    return found


async def read_until(call: Any, kind: str, count: int = 1) -> list[inference_pb.GenerateResponse]:
    """Reads a running Generate until `count` events of a kind have come; the stream stays open."""
    seen: list[inference_pb.GenerateResponse] = []
    async with asyncio.timeout(WAIT_S):
        while sum(event.WhichOneof("event") == kind for event in seen) < count:
            event = await call.read()
            assert event is not grpc.aio.EOF, f"ended after {kinds(seen)}"
            seen.append(event)
    return seen


class _Keyed:
    """A channel whose calls show a key, for stubs."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {key}"),)

    def __getattr__(self, kind: str) -> Any:
        def make(*args: Any, **given: Any) -> Any:
            return functools.partial(getattr(self._channel, kind)(*args, **given), metadata=self._metadata)

        return make


class Api:
    """All services of one server, over a channel of its own; every call shows `key` if there is one."""

    def __init__(
        self,
        target: str,
        options: list[tuple[str, Any]] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        *,
        key: str = "",
    ) -> None:
        self.target = target
        local = [("grpc.use_local_subchannel_pool", 1), *(options or [])]
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(target, local)
        else:
            self.channel = grpc.aio.secure_channel(target, credentials, local)
        used: Any = _Keyed(self.channel, key) if key else self.channel
        self.calls = used
        self.inference = inference_grpc.InferenceServiceStub(used)
        self.models = models_grpc.ModelServiceStub(used)
        self.server = server_grpc.ServerServiceStub(used)
        self.health = health_pb2_grpc.HealthStub(used)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close()

    def generate(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Any:
        return self.inference.Generate(ask(model, prompt, **options))

    async def once(
        self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> inference_pb.GenerateOnceResponse:
        request = inference_pb.GenerateOnceRequest(request=ask(model, prompt, **options))
        async with asyncio.timeout(WAIT_S):
            return await self.inference.GenerateOnce(request)

    async def status(self, name: str) -> pb.ModelStatus:
        answer = await self.models.GetModelStatus(models_pb.GetModelStatusRequest(name=name))
        return answer.status

    async def state(self, name: str) -> str:
        """The state without its prefix."""
        return pb.ModelState.Name((await self.status(name)).state).removeprefix("MODEL_STATE_")

    async def register(self, name: str, path: Path | str, **fields: Any) -> pb.Model:
        request = models_pb.RegisterModelRequest(name=name, path=str(path), **fields)
        return (await self.models.RegisterModel(request)).model

    def load(self, name: str, **options: Any) -> Any:
        """The call, to be awaited or cancelled."""
        return self.models.LoadModel(models_pb.LoadModelRequest(name=name, options=pb.LoadOptions(**options)))

    def unload(self, name: str, drain_s: int | None = None) -> Any:
        """The call, to be awaited."""
        request = models_pb.UnloadModelRequest(name=name)
        if drain_s is not None:
            request.drain_timeout.FromSeconds(drain_s)
        return self.models.UnloadModel(request)

    def delete(self, name: str) -> Any:
        """The call, to be awaited."""
        return self.models.DeleteModel(models_pb.DeleteModelRequest(name=name))

    async def serving(self, service: str) -> str:
        """What health's Check tells of a service."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    async def loading(self, name: str) -> int:
        """Waits until a load has a process; gives its id."""

        async def started() -> int:
            return (await self.status(name)).worker_process_id

        return await eventually(started)

    async def idle(self, name: str) -> pb.ModelStatus:
        """Waits until nothing runs or waits on a model; gives the status then."""

        async def quiet() -> pb.ModelStatus | None:
            status = await self.status(name)
            return None if status.running_count or status.waiting_count else status

        found = await eventually(quiet)
        assert found is not None
        return found


async def stopped_load(api: Api, name: str, **options: Any) -> tuple[Any, int]:
    """A load whose worker is held still before it is ready: the call, and the worker's id."""
    call = api.load(name, **options)
    pid = await api.loading(name)
    os.kill(pid, signal.SIGSTOP)
    assert await api.state(name) == "LOADING"
    return call, pid


@asynccontextmanager
async def serving(folder: Path, spawner: Spawner, **settings: Any) -> AsyncIterator[tuple[Server, Api]]:
    """A server in this loop on a socket in `folder`, and its stubs."""
    values: dict[str, Any] = {
        "listen": [f"unix:{folder}/bear.sock"],
        "models_dir": folder / "models",
        "state_dir": folder / "state",
        "allow_path": [folder],
        "offline": True,
        **settings,
    }
    server = Server(ServerConfig(**values), spawner)
    await server.start()
    try:
        async with Api(server.addresses[0]) as api:
            yield server, api
    finally:
        await server.stop(0)
