"""Several listeners of one server: what each serves, who may connect, and sockets with modes."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from bear_grpc.access.caller import ALL_SCOPES, Scope
from bear_grpc.access.certificates import Identity
from bear_grpc.client import AsyncClient
from bear_grpc.config import ConfigError
from bear_grpc.errors import KeyMissing, ScopeMissing
from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.call import Call
from bear_grpc.server import Server
from bear_grpc.transport import Listener, Tls
from bear_grpc.v1 import server_service_pb2 as server_pb
from tests.helpers.certificates import Authority
from tests.helpers.rpc import Api, Code, eventually, serving

PORT = "127.0.0.1:0"


class Calls:
    """Keeps every call that has ended."""

    def __init__(self, server: Server) -> None:
        self.ended: list[Call] = []
        server.calls.add(self)

    def begin(self, call: Call) -> None:
        pass

    def end(self, call: Call) -> None:
        self.ended.append(call)

    async def first(self, count: int) -> list[Call]:
        """So many; a client may have its answer before its call has ended here."""

        async def there() -> bool:
            return len(self.ended) >= count

        await eventually(there)
        return self.ended[:count]


async def outcomes(target: str, credentials: grpc.ChannelCredentials | None = None) -> dict[str, str]:
    """What a call of each service comes to; a model that is not there is an answer."""
    async with Api(target, credentials=credentials) as api:
        reflect = api.channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        found: dict[str, str] = {}
        calls = {
            "health": lambda: api.serving(""),
            "server": lambda: api.server.GetServerInfo(server_pb.GetServerInfoRequest()),
            "models": lambda: api.status("nothing"),
            "inference": lambda: api.once("nothing"),
        }
        for name, call in calls.items():
            try:
                await call()
                found[name] = "OK"
            except grpc.RpcError as exc:
                found[name] = exc.code().name  # type: ignore[attr-defined]
        stream = reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        try:
            await stream.read()
            found["reflection"] = "OK"
        except grpc.RpcError as exc:
            found["reflection"] = exc.code().name  # type: ignore[attr-defined]
    return found


EVERYTHING = {
    "health": "OK",
    "server": "OK",
    "models": "NOT_FOUND",
    "inference": "NOT_FOUND",
    "reflection": "OK",
}


async def test_each_listener_serves_what_it_is_for(tmp_path: Path, spawner: Spawner) -> None:
    authority = Authority(tmp_path / "authority")
    listeners = [
        Listener(PORT, serves="health"),
        Listener(f"unix:{tmp_path}/admin/s", serves="admin"),
        Listener(PORT, tls="on"),
    ]
    tls = Tls(**authority.server())
    credentials = authority.client("spiffe://test/a").credentials()
    async with serving(tmp_path, spawner, tls=tls, listeners=listeners) as (server, _):
        simple, health, admin, secured = server.addresses
        nothing = dict.fromkeys(EVERYTHING, "UNIMPLEMENTED")
        assert await outcomes(simple) == EVERYTHING
        assert await outcomes(health) == nothing | {"health": "OK"}
        assert await outcomes(admin) == EVERYTHING | {"inference": "UNIMPLEMENTED"}
        assert await outcomes(secured, credentials) == EVERYTHING
        assert (await outcomes(secured))["health"] == "UNAVAILABLE"


async def test_every_listener_tells_the_observers_and_ends_with_the_server(
    tmp_path: Path, spawner: Spawner
) -> None:
    listeners = [Listener(PORT, serves="health"), Listener(PORT, serves="admin")]
    async with serving(tmp_path, spawner, listeners=listeners) as (server, _):
        calls = Calls(server)
        for address in server.addresses:
            async with Api(address) as api:
                await api.serving("")
        assert len(await calls.first(3)) == 3
        addresses = server.addresses
    for address in addresses:
        async with Api(address) as api:
            with pytest.raises(grpc.RpcError) as caught:
                await api.serving("")
            assert caught.value.code() is Code.UNAVAILABLE  # type: ignore[attr-defined]


async def test_a_trusted_socket_says_who_calls_and_others_do_not(tmp_path: Path, spawner: Spawner) -> None:
    listeners = [Listener(f"unix:{tmp_path}/trusted", trusted=True)]
    async with serving(tmp_path, spawner, listeners=listeners) as (server, _):
        calls = Calls(server)
        for address in server.addresses:
            async with AsyncClient(address) as client:
                await client.server_info()
        plain, trusted = await calls.first(2)
        assert (plain.caller.id, trusted.caller.id) == ("", "local")
        assert trusted.caller.scopes == ALL_SCOPES


async def test_a_certificate_gives_the_scopes_of_its_identity(tmp_path: Path, spawner: Spawner) -> None:
    authority = Authority(tmp_path / "authority")
    tls = Tls(**authority.server(), client_ca=authority.file)
    known = {
        "spiffe://test/operator": Identity(
            scopes=frozenset({Scope.SERVER_ADMIN, Scope.MODELS_READ}), tenant="staff"
        ),
        "spiffe://test/*": Identity(models=("demo-*",), priority="low"),
    }
    settings = {"auth": "keys", "identities": known, "state_dir": tmp_path / "state"}
    async with serving(tmp_path, spawner, tls=tls, listen=[PORT], **settings) as (server, _):
        calls = Calls(server)
        for uri in ("spiffe://test/operator", "spiffe://test/app"):
            async with AsyncClient(server.addresses[0], tls=authority.client(uri)) as client:
                await client.server_info()
        async with AsyncClient(server.addresses[0], tls=authority.client("spiffe://other/app")) as client:
            with pytest.raises(KeyMissing):
                await client.server_info()
        async with AsyncClient(server.addresses[0], tls=authority.client("spiffe://test/app")) as client:
            with pytest.raises(ScopeMissing):
                await client.drain()
        operator, app, other, _ = (call.caller for call in await calls.first(4))
        # What SIGHUP reads counts for the calls that come then.
        fewer = msgspec.structs.replace(server.reloads.config, identities={})
        await server.reloads.reload(lambda: fewer)
        async with AsyncClient(server.addresses[0], tls=authority.client("spiffe://test/app")) as client:
            with pytest.raises(KeyMissing):
                await client.server_info()
        assert (operator.id, operator.tenant) == ("spiffe://test/operator", "staff")
        assert operator.scopes == {Scope.SERVER_ADMIN, Scope.MODELS_READ}
        assert (app.id, app.models, app.priority.name) == ("spiffe://test/app", ("demo-*",), "LOW")
        assert app.may(Scope.INFER) and not app.may(Scope.SERVER_ADMIN)
        assert other.id == ""
        assert other.tenant.startswith("ipv4:")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o077])
async def test_sockets_have_their_modes_whatever_the_umask(
    tmp_path: Path, spawner: Spawner, mask: int
) -> None:
    before = os.umask(mask)
    try:
        paths = [tmp_path / "a" / "s", tmp_path / "b" / "c" / "s", tmp_path / "d" / "s"]
        listen = [f"unix:{path}" for path in paths[:2]]
        third = Listener(f"unix://{paths[2]}", mode="0660")
        async with serving(tmp_path, spawner, listen=listen[:1], listeners=[third]) as (server, _):
            assert mode_of(paths[0]) == 0o600
            assert mode_of(paths[0].parent) == 0o700
            assert mode_of(paths[2]) == 0o660
            assert mode_of(paths[2].parent) == 0o750
            assert os.umask(mask) == mask
            assert await outcomes(server.addresses[1]) == EVERYTHING
        async with serving(tmp_path, spawner, listen=listen[1:], socket_mode="666"):
            assert mode_of(paths[1]) == 0o666
            assert mode_of(paths[1].parent) == 0o755
    finally:
        os.umask(before)


async def test_the_mode_of_a_folder_that_is_there_is_kept(tmp_path: Path, spawner: Spawner) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o711)
    async with serving(tmp_path, spawner, listen=[f"unix:{folder}/s"], socket_mode="0666"):
        assert mode_of(folder) == 0o711


async def test_a_folder_that_everybody_may_write_in_is_warned_of(
    tmp_path: Path, spawner: Spawner, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING, "bear_grpc.rpc.listeners"):
        async with serving(tmp_path, spawner, listen=[f"unix:{folder}/s"]):
            assert str(folder) in caplog.text


async def test_a_socket_that_a_server_listens_on_is_not_taken_away(tmp_path: Path, spawner: Spawner) -> None:
    address = f"unix:{tmp_path}/s"
    async with serving(tmp_path, spawner, listen=[address]):
        with pytest.raises(ConfigError, match="another server listens there"):
            async with serving(tmp_path / "second", spawner, listen=[address]):
                pass
        async with Api(address) as api:
            assert await api.server.GetServerInfo(server_pb.GetServerInfoRequest())


async def test_a_socket_that_is_left_over_is_taken(tmp_path: Path, spawner: Spawner) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    async with serving(tmp_path, spawner, listen=[f"unix:{tmp_path}/s"]) as (_, api):
        assert await api.server.GetServerInfo(server_pb.GetServerInfoRequest())


async def test_a_folder_that_cannot_be_made_ends_the_start(tmp_path: Path, spawner: Spawner) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        async with serving(tmp_path, spawner, listen=[f"unix:{tmp_path}/file/s"]):
            pass
