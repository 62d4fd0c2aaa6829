"""Both clients over TLS; what the server's side of it does is in tests/rpc/test_tls.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bear_grpc.client import AsyncClient, Client, ServerUnreachable, Tls
from bear_grpc.client.tls import address_of, tls_of
from tests.client.fake_server import WAIT_S, FakeServer
from tests.helpers.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def secured(authority: Authority) -> Iterator[FakeServer]:
    files = authority.server()
    pair = (files["key"].read_bytes(), files["certificate"].read_bytes())
    fake = FakeServer("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    yield fake
    fake.stop()


@pytest.mark.parametrize("scheme", ["", "grpcs://"])
async def test_both_clients_speak_tls(scheme: str, secured: FakeServer, authority: Authority) -> None:
    target = scheme + secured.target
    for tls in (Tls(ca=authority.file), Tls(ca=authority.pem), Tls(ca=str(authority.file))):
        with Client(target, tls=tls, timeout=WAIT_S) as client:
            assert client.generate_once("m", "p").choices[0].text == "Hello"
    async with AsyncClient(target, tls=Tls(ca=authority.file), timeout=WAIT_S) as client:
        assert [text async for text in client.stream_text("m", "p")] == ["Hel", "lo"]


def test_authorities_that_are_not_told_are_those_of_the_world(secured: FakeServer) -> None:
    for client in (Client(f"grpcs://{secured.target}"), Client(secured.target, tls=True)):
        with client, pytest.raises(ServerUnreachable, match="not trusted"):
            client.server_info()


def test_a_server_without_tls_is_told(server: FakeServer, authority: Authority) -> None:
    with Client(server.target, tls=Tls(ca=authority.file)) as client:  # noqa: SIM117
        with pytest.raises(ServerUnreachable, match="does not speak TLS"):
            client.server_info()


@pytest.mark.parametrize(
    ("target", "tls", "found"),
    [
        ("h:1", False, None),
        ("h:1", True, Tls()),
        ("grpcs://h:1", False, Tls()),
        ("grpcs://h:1", Tls(ca="c"), Tls(ca="c")),
        ("grpcs://ipv4:10.0.0.1:1,10.0.0.2:1", False, Tls()),
    ],
)
def test_the_target_or_the_argument_asks_for_tls(target: str, tls: Tls | bool, found: Tls | None) -> None:
    assert tls_of(target, tls) == found
    assert address_of(target) == target.removeprefix("grpcs://")
