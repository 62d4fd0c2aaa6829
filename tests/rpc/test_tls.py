"""TLS: whom clients and the server trust, and certificates that change while streams run."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from bear_grpc.client import AsyncClient, ServerUnreachable, Tls
from bear_grpc.config import ConfigError
from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.call import Call
from bear_grpc.server import Server
from bear_grpc.transport import Tls as TlsFiles
from tests.helpers.certificates import Authority, serial_of, shown_by
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import WAIT_S, Api, collect, kinds, read_until, serving

STREAMS, CONNECTIONS, ROTATIONS, TOKENS = 100, 10, 5, 150


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


Serve = Callable[..., contextlib.AbstractAsyncContextManager[tuple[Server, str]]]


@pytest.fixture
def serve(tmp_path: Path, spawner: Spawner) -> Serve:
    """Starts a server with these files on a port; gives its address, too. `serving`'s own stubs go unused."""

    @contextlib.asynccontextmanager
    async def start(files: dict[str, Path], **settings: object) -> AsyncIterator[tuple[Server, str]]:
        tls = TlsFiles(**files)
        listen = ["127.0.0.1:0"]
        async with serving(tmp_path, spawner, listen=listen, tls=tls, **settings) as (server, _):
            yield server, server.addresses[0]

    return start


def client(address: str, tls: Tls | bool) -> AsyncClient:
    return AsyncClient(address, tls=tls, timeout=WAIT_S)


async def test_a_client_that_trusts_the_authority_is_served(authority: Authority, serve: Serve) -> None:
    async with serve(authority.server()) as (_, address):
        for target in (address, f"grpcs://{address}"):
            async with client(target, Tls(ca=authority.file)) as trusting:
                assert (await trusting.server_info()).version


async def test_a_client_that_trusts_others_leaves(tmp_path: Path, authority: Authority, serve: Serve) -> None:
    stranger = Authority(tmp_path / "stranger")
    async with serve(authority.server()) as (_, address):
        for tls in (Tls(ca=stranger.file), True):
            async with client(address, tls) as strange:
                with pytest.raises(ServerUnreachable, match="unable to get local issuer certificate"):
                    await strange.server_info()


async def test_an_expired_certificate_is_refused(authority: Authority, serve: Serve) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    async with serve(authority.server(expires=yesterday)) as (_, address):  # noqa: SIM117
        async with client(address, Tls(ca=authority.file)) as careful:
            with pytest.raises(ServerUnreachable, match="certificate has expired"):
                await careful.server_info()


async def test_a_certificate_for_another_host_is_refused_unless_its_name_is_told(
    authority: Authority, serve: Serve
) -> None:
    async with serve(authority.server()) as (_, address):
        async with client(address, Tls(ca=authority.file, server_name="bear.example")) as careful:
            with pytest.raises(ServerUnreachable, match="Hostname Verification"):
                await careful.server_info()
        async with client(address, Tls(ca=authority.file, server_name="localhost")) as told:
            assert (await told.server_info()).version


async def test_plaintext_gets_nothing_where_tls_is_spoken(authority: Authority, serve: Serve) -> None:
    async with serve(authority.server()) as (_, address), client(address, False) as plain:
        with pytest.raises(ServerUnreachable, match="it may speak TLS"):
            await plain.server_info()


@pytest.mark.timeout(180)
async def test_streams_go_on_while_certificates_are_rotated(
    tmp_path: Path, authority: Authority, serve: Serve
) -> None:
    files = authority.server()
    path = write_tiny_llama(tmp_path / "rotated.gguf", context_length=1024)
    seen = {serial_of(files["certificate"])}
    async with serve(files) as (_, address), contextlib.AsyncExitStack() as stack:
        credentials = Tls(ca=authority.file).credentials()
        apis = [
            await stack.enter_async_context(Api(address, credentials=credentials)) for _ in range(CONNECTIONS)
        ]
        await apis[0].register("rotated", path)
        await apis[0].load("rotated", threads=1, max_sequences=STREAMS)
        streams = [
            apis[number % CONNECTIONS].generate("rotated", max_tokens=TOKENS, ignore_eos=True)
            for number in range(STREAMS)
        ]
        begun = await asyncio.gather(*(read_until(stream, "delta") for stream in streams))
        for _ in range(ROTATIONS):
            authority.server()  # over the old files
            shown = await asyncio.to_thread(shown_by, address, authority.file)
            assert shown == serial_of(files["certificate"])
            seen.add(shown)
        async with Api(address, credentials=credentials) as newcomer:
            assert (await newcomer.status("rotated")).running_count == STREAMS
        ended = await asyncio.gather(*map(collect, streams))
    assert len(seen) == ROTATIONS + 1
    for first, rest in zip(begun, ended, strict=True):
        assert kinds([*first, *rest])[-1] == "completed"
        assert rest[-1].completed.usage.completion_token_count == TOKENS


async def test_broken_files_leave_the_old_certificate_in_force_and_are_told_of_once(
    authority: Authority, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    files = authority.server()
    old = serial_of(files["certificate"])
    other = authority.server("other")

    def break_it() -> None:
        files["certificate"].write_text("no certificate")

    def remove_it() -> None:
        files["key"].unlink()

    def mix_it() -> None:
        shutil.copy(other["certificate"], files["certificate"])
        files["key"].write_bytes(old_key)

    old_key = files["key"].read_bytes()
    async with serve(files) as (_, address):
        with caplog.at_level(logging.ERROR, "bear_grpc.rpc.certificates"):
            for number, change in enumerate((break_it, remove_it, mix_it), 1):
                change()
                for _ in range(3):
                    assert await asyncio.to_thread(shown_by, address, authority.file) == old
                assert len(caplog.records) == number, caplog.text
        shutil.copy(other["key"], files["key"])
        new = await asyncio.to_thread(shown_by, address, authority.file)
        assert new == serial_of(other["certificate"]) != old


async def test_files_behind_links_are_followed(tmp_path: Path, authority: Authority, serve: Serve) -> None:
    """As Kubernetes mounts a secret: a folder is swapped by one rename."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for kind, file in authority.server().items():
            shutil.copy(file, tmp_path / name / kind)
    (tmp_path / "data").symlink_to("first")
    files = {kind: tmp_path / "data" / kind for kind in ("certificate", "key")}
    async with serve(files) as (_, address):
        first = await asyncio.to_thread(shown_by, address, authority.file)
        (tmp_path / "new").symlink_to("second")
        os.replace(tmp_path / "new", tmp_path / "data")
        assert await asyncio.to_thread(shown_by, address, authority.file) != first


@pytest.mark.parametrize("what", ["missing", "mixed", "empty", "encrypted"])
async def test_a_server_does_not_start_with_files_that_cannot_be_used(
    what: str, authority: Authority, serve: Serve
) -> None:
    files = authority.server()
    if what == "missing":
        files["key"].unlink()
    elif what == "mixed":
        files["key"] = authority.server("other")["key"]
    elif what == "empty":
        files["certificate"].write_bytes(b"")
    else:
        authority.encrypt(files["key"])
    with pytest.raises(ConfigError, match=r"^tls: .*server\.(pem|key)"):
        async with serve(files):
            pass


async def test_a_client_without_a_certificate_is_not_served_where_one_is_asked_for(
    tmp_path: Path, authority: Authority, serve: Serve
) -> None:
    stranger = Authority(tmp_path / "stranger").client("spiffe://test/a")
    strange = Tls(ca=authority.file, certificate=stranger.certificate, key=stranger.key)
    async with serve(authority.server() | {"client_ca": authority.file}) as (_, address):
        for tls in (Tls(ca=authority.file), strange):
            async with client(address, tls) as refused:
                with pytest.raises(ServerUnreachable, match="client certificate"):
                    await refused.server_info()
        async with client(address, authority.client("spiffe://test/a")) as known:
            assert (await known.server_info()).version


class Callers:
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def begin(self, call: Call) -> None:
        pass

    def end(self, call: Call) -> None:
        self.calls.append(call)


async def test_a_client_certificate_says_who_calls(authority: Authority, serve: Serve) -> None:
    async with serve(authority.server() | {"client_ca": authority.file}) as (server, address):
        callers = Callers()
        server.calls.add(callers)
        tls = authority.client("spiffe://test/a", dns=("a.example",))
        async with client(address, tls) as known:
            await known.server_info()
            async for _ in known.list_models():
                pass
        assert {call.caller.id for call in callers.calls} == {"spiffe://test/a"}
        assert {call.caller.tenant for call in callers.calls} == {"spiffe://test/a"}


def test_half_a_client_certificate_is_an_error() -> None:
    with pytest.raises(ValueError, match="key"):
        Tls(certificate=b"x").credentials()


def test_credentials_of_files_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Tls(ca=tmp_path / "gone").credentials()


def test_credentials_are_grpc_s() -> None:
    assert isinstance(Tls().credentials(), grpc.ChannelCredentials)
