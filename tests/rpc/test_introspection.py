"""Health, reflection, and what the server tells about itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from bear_grpc import __version__
from bear_grpc.config import ServerConfig
from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.orca_messages import SERVICE as ORCA
from bear_grpc.server import SERVICES, Server
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import server_service_pb2 as server_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import WAIT_S, Api, Code, fails, serving
from tests.rpc.conftest import NewModel

Status = health_pb2.HealthCheckResponse.ServingStatus
HEALTH = "grpc.health.v1.Health"
ALPHA, V1 = "grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection"


async def health_fails(api: Api, service: str) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        await api.serving(service)
    return caught.value.code()  # type: ignore[no-any-return, attr-defined]


class Watched:
    """A running health Watch."""

    def __init__(self, api: Api, service: str) -> None:
        self._call = api.health.Watch(health_pb2.HealthCheckRequest(service=service))

    async def next(self) -> str:
        async with asyncio.timeout(WAIT_S):
            return Status.Name((await self._call.read()).status)

    async def told_draining(self) -> None:
        """Its ending is the server's."""
        await fails(self._call.read(), Code.UNAVAILABLE, "DRAINING")

    def cancel(self) -> None:
        self._call.cancel()


@pytest.mark.parametrize("service", ["", "liveness", *SERVICES])
async def test_a_serving_server_is_healthy(api: Api, service: str) -> None:
    assert await api.serving(service) == "SERVING"


async def test_health_follows_a_model_through_its_life(api: Api, files: Path) -> None:
    path = write_tiny_llama(files / "patient.gguf")
    service = "models/patient"
    assert await health_fails(api, service) is Code.NOT_FOUND
    watch = Watched(api, service)
    assert await watch.next() == "SERVICE_UNKNOWN"
    await api.register("patient", path)
    assert await watch.next() == "NOT_SERVING"
    assert await api.serving(service) == "NOT_SERVING"
    await api.load("patient", threads=1)
    assert await watch.next() == "SERVING"
    assert await api.serving(service) == "SERVING"
    await api.unload("patient")
    assert await watch.next() == "NOT_SERVING"
    await api.delete("patient")
    assert await watch.next() == "SERVICE_UNKNOWN"
    assert await health_fails(api, service) is Code.NOT_FOUND
    watch.cancel()


async def test_a_failed_load_leaves_a_model_not_serving(api: Api, new_model: NewModel, files: Path) -> None:
    name = await new_model()
    os.truncate(files / f"{name}.gguf", 50)
    with pytest.raises(grpc.RpcError):
        await api.load(name)
    assert await api.serving(f"models/{name}") == "NOT_SERVING"


async def test_an_unknown_service_is_not_found(api: Api) -> None:
    assert await health_fails(api, "bear_grpc.v1.NoService") is Code.NOT_FOUND
    assert await health_fails(api, "models/none") is Code.NOT_FOUND


async def test_a_stopping_server_tells_its_watchers_and_ends_them(tmp_path: Path, spawner: Spawner) -> None:
    server = Server(ServerConfig(listen=[f"unix:{tmp_path}/bear.sock"], models_dir=tmp_path), spawner)
    await server.start()
    async with Api(server.addresses[0]) as api:
        watches = [Watched(api, service) for service in ("", SERVICES[0], "models/bear-demo", "liveness")]
        assert [await watch.next() for watch in watches] == ["SERVING", "SERVING", "NOT_SERVING", "SERVING"]
        stopping = asyncio.create_task(server.stop(5))
        assert [await watch.next() for watch in watches[:2]] == ["NOT_SERVING", "NOT_SERVING"]
        for watch in watches:
            await watch.told_draining()
        async with asyncio.timeout(WAIT_S):
            await stopping


def _services_of(target: str) -> list[str]:
    with grpc.insecure_channel(target) as channel:
        return list(ProtoReflectionDescriptorDatabase(channel).get_services())


async def test_reflection_v1alpha_lists_and_describes_the_services(api: Api) -> None:
    services = [*SERVICES, HEALTH, ORCA, ALPHA]
    assert sorted(await asyncio.to_thread(_services_of, api.target)) == sorted(services)

    def describe() -> dict[str, list[str]]:
        with grpc.insecure_channel(api.target) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            files = {name: database.FindFileContainingSymbol(name) for name in services}
            return {name: [method.name for method in file.service[0].method] for name, file in files.items()}

    methods = await asyncio.to_thread(describe)
    assert "Generate" in methods["bear_grpc.v1.InferenceService"]
    assert methods[ORCA] == ["StreamCoreMetrics"]


async def reflect_v1(api: Api) -> Any:
    call = api.channel.stream_stream(
        f"/{V1}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services="*"))
    answer = await call.read()
    await call.done_writing()
    return answer


async def test_reflection_v1_lists_the_services(api: Api) -> None:
    answer = await reflect_v1(api)
    names = [service.name for service in answer.list_services_response.service]
    assert {*SERVICES, HEALTH} <= set(names)


async def test_reflection_is_off_where_others_can_connect(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner, listen=["0.0.0.0:0"], insecure_public=True) as (server, _):
        port = server.addresses[0].rpartition(":")[2]
        async with Api(f"127.0.0.1:{port}") as api:
            assert await api.serving("") == "SERVING"
            with pytest.raises(grpc.RpcError) as caught:
                await reflect_v1(api)
            assert caught.value.code() is Code.UNIMPLEMENTED  # type: ignore[attr-defined]


@pytest.mark.parametrize(("listen", "reflection"), [("127.0.0.1:0", None), ("0.0.0.0:0", True)])
async def test_reflection_is_on_on_loopback_or_when_set(
    tmp_path: Path, spawner: Spawner, listen: str, reflection: bool | None
) -> None:
    async with serving(tmp_path, spawner, listen=[listen], reflection=reflection, insecure_public=True) as (
        server,
        _,
    ):
        port = server.addresses[0].rpartition(":")[2]
        async with Api(f"127.0.0.1:{port}") as api:
            assert (await reflect_v1(api)).list_services_response.service


async def test_the_server_tells_what_it_is(api: Api, files: Path) -> None:
    calls = [api.server.GetServerInfo(server_pb.GetServerInfoRequest()) for _ in range(5)]
    infos = await asyncio.gather(*calls)
    info = infos[0]
    assert info.version == __version__
    assert info.llama_cpp_python_version
    assert info.llama_cpp_build
    assert [device.kind for device in info.devices][:1] == [server_pb.DEVICE_KIND_CPU]
    assert info.devices[0].total_bytes > 0
    assert info.core_count >= 1
    assert str(files) in info.allowed_paths
    assert info.limits.max_text_bytes == 2**20
    assert all(other == info or other.devices for other in infos)


async def test_the_server_adds_up_what_its_models_hold(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner, allow_path=[tmp_path]) as (_, api):

        async def told() -> pb.MemoryLedger:
            return (await api.server.GetServerInfo(server_pb.GetServerInfoRequest())).memory

        assert await told() == pb.MemoryLedger()
        for name in ("a", "b"):
            path = write_tiny_llama(tmp_path / f"{name}.gguf", context_length=2048)
            await api.register(name, path, load_options=pb.LoadOptions(threads=1, max_sequences=1))
            assert (await api.load(name)).status.memory.process_bytes > 0
        memory, ledgers = await told(), [(await api.status(name)).memory for name in ("a", "b")]
        for field in ("weights_bytes", "kv_cache_bytes", "compute_bytes"):
            assert getattr(memory, field) == sum(getattr(ledger, field) for ledger in ledgers) > 0
        assert memory.process_bytes > max(ledger.process_bytes for ledger in ledgers)
        listed = (await api.models.ListModels(models_pb.ListModelsRequest())).models
        assert {model.name for model in listed if model.status.memory.process_bytes} == {"a", "b"}


async def test_a_message_above_the_limit_is_refused_by_grpc(api: Api, tiny: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await api.once(tiny, "x" * (5 * 2**20))
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
