"""What the server refuses: by keys, by its settings, when it stops, and when it fails itself."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bear_grpc import errors
from bear_grpc import server as server_module
from bear_grpc.access.caller import Quotas, Scope
from bear_grpc.access.key import DEFAULT_SCOPES
from bear_grpc.access.quotas import DAY_S, Limiter
from bear_grpc.server import Server
from bear_grpc.testing.clock import FakeClock
from bear_grpc.types import SandboxMode
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import server_service_pb2 as server_pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, StatusDetails

from .bench import Bench, answers

PACKAGE = Path(errors.__file__).parent


@asynccontextmanager
async def locked(bench: Bench) -> AsyncIterator[Server]:
    """A server that asks for keys."""
    async with bench.server(auth="keys", auto_pull="never") as (server, _):
        yield server


async def key_missing(bench: Bench) -> list[StatusDetails]:
    async with locked(bench) as server:
        _, text = await bench.key(server)
        async with Api(server.addresses[0]) as api:
            told = await bench.refused(api.status("bear-demo"), "KEY_MISSING")
            request = models_pb.GetModelStatusRequest(name="bear-demo")
            assert await api.models.GetModelStatus(request, metadata=(("x-api-key", text),))
            assert await api.serving("") == "SERVING"
    return [told]


async def key_invalid(bench: Bench) -> list[StatusDetails]:
    async with locked(bench) as server:
        _, text = await bench.key(server)
        async with Api(server.addresses[0], key=text[:-1]) as api:
            told = await bench.refused(api.status("bear-demo"), "KEY_INVALID")
        async with Api(server.addresses[0], key=text) as api:
            await api.status("bear-demo")
    return [told]


async def scope_missing(bench: Bench) -> list[StatusDetails]:
    async with locked(bench) as server:
        _, text = await bench.key(server, scopes=DEFAULT_SCOPES)
        async with Api(server.addresses[0], key=text) as api:
            told = await bench.refused(api.load("bear-demo"), "SCOPE_MISSING")
        wanted = frozenset({Scope(told.metadata["scope"])})
        _, text = await bench.key(server, scopes=wanted)
        async with Api(server.addresses[0], key=text) as api:
            await api.load("bear-demo")
    return [told]


async def model_denied(bench: Bench) -> list[StatusDetails]:
    async with locked(bench) as server:
        _, text = await bench.key(server, models=("tiny*",))
        async with Api(server.addresses[0], key=text) as api:
            told = await bench.refused(api.status("bear-demo"), "MODEL_DENIED")
        _, text = await bench.key(server, models=(told.metadata["model"],))
        async with Api(server.addresses[0], key=text) as api:
            await api.status("bear-demo")
    return [told]


async def quota_exceeded(bench: Bench) -> list[StatusDetails]:
    clock, wall = FakeClock(), FakeClock(20_000 * DAY_S)
    bench.patch.setattr(server_module, "Limiter", functools.partial(Limiter, clock, wall))
    async with locked(bench) as server:
        key_id, text = await bench.key(server, quotas=Quotas(requests_per_minute=1))
        async with Api(server.addresses[0], key=text) as api:

            async def count() -> Any:
                request = inference_pb.CountTokensRequest(model="bear-demo", prompt="hello")
                return await api.inference.CountTokens(request)

            await count()
            told = await bench.refused(count(), "QUOTA_EXCEEDED")
            assert told.metadata["subject"] == key_id
            assert told.retry is not None
            clock.advance(told.retry.retry_delay.ToTimedelta().total_seconds())
            await count()
    return [told]


async def path_not_allowed(bench: Bench) -> list[StatusDetails]:
    path = write_tiny_llama(bench.folder / "a.gguf")
    async with bench.serving(allow_path=[]) as api:
        told = await bench.refused(api.register("a", path), "PATH_NOT_ALLOWED")
    async with bench.serving(allow_path=[path.parent]) as api:
        await api.register("a", path)
        await answers(api, "a")
    async with bench.serving(allow_path=[]) as api:
        await bench.refused(api.load("a"), "PATH_NOT_ALLOWED")
    return [told]


async def draining(bench: Bench) -> list[StatusDetails]:
    async with bench.serving(withdrawal_s=0.0) as api:
        await api.server.Drain(server_pb.DrainRequest())
        told = await bench.refused(api.once("bear-demo"), "DRAINING")
        assert await api.serving("") == "NOT_SERVING"
        assert await api.serving("liveness") == "SERVING"
    async with bench.serving() as api:
        await answers(api, "bear-demo")
    return [told]


async def sandbox_unavailable(bench: Bench) -> list[StatusDetails]:
    module = "tests.helpers.unconfined_worker"
    async with bench.serving(bench.start(SandboxMode.REQUIRE, module)) as api:
        told = await bench.refused(api.load("bear-demo"), "SANDBOX_UNAVAILABLE")
    async with bench.serving(bench.start(SandboxMode.AUTO, module)) as api:
        await answers(api, "bear-demo")
        info = await api.server.GetServerInfo(server_pb.GetServerInfoRequest())
        assert info.sandbox_detail == told.metadata["problem"]
    assert "WORKERS ARE NOT FULLY CONFINED" in bench.log.text
    return [told]


def raising(error: Exception) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


async def internal(bench: Bench) -> list[StatusDetails]:
    async with bench.server() as (server, api):
        with bench.patch.context() as patch:
            patch.setattr(server.shelf, "list", raising(ValueError("of nobody's business")))
            told = await bench.refused(api.models.ListModels(models_pb.ListModelsRequest()), "INTERNAL")
            patch.setattr(server.manager, "using", raising(ValueError("of nobody's business")))
            named = await bench.refused(api.once("bear-demo", request_id="job-17"), "INTERNAL")
        assert named.metadata["request_id"] == "job-17"
        assert (await api.models.ListModels(models_pb.ListModelsRequest())).models
        await answers(api, "bear-demo")
    assert "business" not in repr(told)
    found = told.metadata["request_id"]
    assert found in told.message
    traced = [record for record in bench.log.records if found in record.getMessage()]
    assert [record.exc_info is not None for record in traced] == [True]
    lines = [record for record in bench.log.records if record.name == "bear_grpc.requests"]
    assert found in [getattr(record, "fields", {}).get("id") for record in lines]
    return [told]


async def feature_unsupported(bench: Bench) -> list[StatusDetails]:
    """Nothing raises it: whoever makes something raise it tries that here."""
    sources = [path for path in PACKAGE.rglob("*.py") if path.name != "errors.py"]
    assert [path for path in sources if "FeatureUnsupported(" in path.read_text(encoding="utf-8")] == []
    async with bench.server() as (server, api):
        with bench.patch.context() as patch:
            patch.setattr(server.shelf, "list", raising(errors.FeatureUnsupported("page_size")))
            listing = api.models.ListModels(models_pb.ListModelsRequest(page_size=1))
            told = await bench.refused(listing, "FEATURE_UNSUPPORTED")
    return [told]
