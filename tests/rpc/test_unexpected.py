"""What nobody expected: INTERNAL without its text, and never a call that hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from bear_grpc.rpc.inference import InferenceServicer
from bear_grpc.rpc.models import ModelServicer
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import inference_service_pb2_grpc as inference_grpc
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import model_service_pb2_grpc as models_grpc
from tests.helpers.rpc import WAIT_S, Api, Code, ask, fails, stream_fails

SECRET = "the secret path /home/somebody"


class _Broken:
    """A manager of which everything raises."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


class _Cancelling:
    """A manager whose work is cancelled from inside, as when a task of its own is."""

    async def executor(self, name: str) -> None:
        raise asyncio.CancelledError

    @asynccontextmanager
    async def using(self, *args: Any, **kwargs: Any) -> AsyncIterator[None]:
        raise asyncio.CancelledError
        yield


async def _serve(folder: Path, manager: Any) -> AsyncIterator[Api]:
    server = grpc.aio.server()
    inference_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(manager, manager, "tenant", WAIT_S), server
    )
    models_grpc.add_ModelServiceServicer_to_server(
        ModelServicer(manager, manager, manager, manager, WAIT_S), server
    )
    target = f"unix:{folder}/broken.sock"
    server.add_insecure_port(target)
    await server.start()
    async with Api(target) as api:
        yield api
    await server.stop(0)


@pytest.fixture(params=[ValueError, AssertionError, KeyError])
async def broken(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    async for api in _serve(tmp_path, _Broken(request.param(SECRET))):
        yield api


@pytest.fixture
async def cancelling(tmp_path: Path) -> AsyncIterator[Api]:
    async for api in _serve(tmp_path, _Cancelling()):
        yield api


async def test_an_unexpected_error_is_internal_without_its_text(broken: Api) -> None:
    calls = [
        broken.once("model"),
        broken.inference.Tokenize(inference_pb.TokenizeRequest(model="model", text="a")),
        broken.status("model"),
        broken.models.ListModels(models_pb.ListModelsRequest()),
    ]
    for call in calls:
        status = await fails(call, Code.INTERNAL, "INTERNAL")
        assert "secret" not in repr(status)
    seen, status = await stream_fails(broken.inference.Generate(ask("model")), Code.INTERNAL, "INTERNAL")
    assert seen == []
    assert "secret" not in repr(status)


async def test_the_id_that_a_client_is_told_leads_to_the_traceback(
    broken: Api, caplog: pytest.LogCaptureFixture
) -> None:
    status = await fails(broken.status("model"), Code.INTERNAL, "INTERNAL")
    request_id = status.metadata["request_id"]
    assert request_id in status.message
    (record,) = [record for record in caplog.records if request_id in record.getMessage()]
    assert record.exc_info is not None
    assert SECRET in str(record.exc_info[1])


async def test_a_cancellation_from_inside_is_internal_and_no_hang(cancelling: Api) -> None:
    await fails(cancelling.once("model"), Code.INTERNAL, "INTERNAL")
    await stream_fails(cancelling.inference.Generate(ask("model")), Code.INTERNAL, "INTERNAL")
    call = cancelling.inference.Tokenize(inference_pb.TokenizeRequest(model="model", text="a"))
    await fails(call, Code.INTERNAL, "INTERNAL")
