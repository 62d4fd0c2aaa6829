"""What may be listened on: settings of listeners and TLS, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bear_grpc.access.certificates import Identity
from bear_grpc.config import ConfigError, ServerConfig, load_config
from bear_grpc.transport import Listener, Tls

PAIR = Tls(Path("c"), Path("k"))
MUTUAL = Tls(Path("c"), Path("k"), Path("ca"))
PUBLIC = "0.0.0.0:50051"


def config(**settings: Any) -> ServerConfig:
    return ServerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "has no TLS and asks nobody for a key"),
        ({"auth": "keys"}, "has no TLS;"),
        ({"tls": PAIR}, "asks nobody for a key"),
        ({"tls": PAIR, "auth": "keys"}, None),
        ({"tls": MUTUAL}, None),
        ({"insecure_public": True}, None),
    ],
)
@pytest.mark.parametrize("address", [PUBLIC, "[::]:50051", "10.0.0.1:1", ":50051", "bear.example:1"])
def test_a_public_address_needs_tls_and_keys_or_so_many_words(
    address: str, settings: dict[str, Any], told: str | None
) -> None:
    if told is None:
        assert config(listen=[address], **settings).listen == [address]
        return
    with pytest.raises(ConfigError) as caught:
        config(listen=[address], **settings)
    assert told in str(caught.value)
    assert address in str(caught.value)
    assert "insecure_public = true" in str(caught.value)


def test_a_public_entry_of_the_listeners_is_refused_as_well() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:50051, which has no TLS"):
        config(listeners=[Listener(PUBLIC)], tls=PAIR, auth="keys")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "unix:/s", "unix-abstract:s", "[::1]:1"])
def test_this_machine_needs_nothing(address: str) -> None:
    assert config(listen=[address]).listen == [address]


def test_health_alone_may_be_public() -> None:
    assert config(listeners=[Listener(PUBLIC, serves="health")]).pause_s == 2.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tls": Tls(certificate=Path("c"))}, "tls.key"),
        ({"tls": Tls(key=Path("k"))}, "tls.certificate"),
        ({"tls": Tls(client_ca=Path("k"))}, "tls.certificate"),
        ({"listeners": [Listener("127.0.0.1:1", tls="on")]}, "needs tls.certificate"),
        ({"listeners": [Listener("127.0.0.1:1", tls="mutual")], "tls": PAIR}, "tls.client_ca"),
        ({"listeners": [Listener(PUBLIC, serves="admin")], "insecure_public": True}, "serves: admin"),
        ({"listeners": [Listener("127.0.0.1:1", trusted=True)]}, "trusted"),
        ({"listeners": [Listener("unix-abstract:a", trusted=True)]}, "trusted"),
        ({"listeners": [Listener("unix:/a", trusted=True, mode="0666")]}, "trusted"),
        ({"listeners": [Listener("unix:/a", trusted=True)], "socket_mode": "0606"}, "trusted"),
        ({"socket_mode": "0888"}, "socket_mode"),
        ({"socket_mode": "66"}, "socket_mode"),
        ({"socket_mode": "4660"}, "socket_mode"),
        ({"listen": []}, "listen"),
        ({"listen": ["127.0.0.1:1", "127.0.0.1:1"]}, "twice"),
        ({"listeners": [Listener("127.0.0.1:50051")]}, "twice"),
        ({"identities": {"a": Identity()}}, "identities"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    assert named in str(caught.value)


def test_ports_that_are_chosen_may_be_many() -> None:
    assert len(config(listen=["127.0.0.1:0", "127.0.0.1:0"]).all_listeners) == 2


@pytest.mark.parametrize(("tls", "kind"), [(Tls(), "off"), (PAIR, "on"), (MUTUAL, "mutual")])
def test_listen_speaks_tls_over_tcp_where_there_is_a_certificate(tls: Tls, kind: str) -> None:
    settings = config(listen=["127.0.0.1:1", "unix:/s"], tls=tls, listeners=[Listener("127.0.0.1:2")])
    assert [listener.tls for listener in settings.all_listeners] == [kind, "off", "off"]


@pytest.mark.parametrize(
    ("address", "socket"),
    [
        ("unix:/a/s", Path("/a/s")),
        ("unix:///a/s", Path("/a/s")),
        ("unix:s", Path("s")),
        ("unix-abstract:s", None),
        ("127.0.0.1:1", None),
    ],
)
def test_the_file_of_a_socket(address: str, socket: Path | None) -> None:
    assert Listener(address).socket == socket


FILE = """
listen = ["0.0.0.0:50051"]
auth = "keys"

[tls]
certificate = "/tls/cert.pem"
key = "/tls/key.pem"
client_ca = "/tls/ca.pem"

[[listeners]]
address = "127.0.0.1:50052"
serves = "health"

[[listeners]]
address = "unix:/run/bear/admin.sock"
serves = "admin"
trusted = true
mode = "0660"

[identities."spiffe://example.org/apps/*"]
scopes = ["infer"]
models = ["bear-*"]
priority = "normal"
tenant = "apps"
quotas = { requests_per_minute = 600 }
"""


def test_all_of_it_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "bear.toml").write_text(FILE)
    settings = load_config(tmp_path / "bear.toml", environ={})
    public, health, admin = settings.all_listeners
    assert (public.tls, public.serves) == ("mutual", "all")
    assert (health.tls, health.serves) == ("off", "health")
    assert (admin.trusted, admin.bits, admin.socket) == (True, 0o660, Path("/run/bear/admin.sock"))
    [(name, identity)] = settings.identities.items()
    assert name == "spiffe://example.org/apps/*"
    assert identity.quotas.requests_per_minute == 600
    assert not settings.with_reflection


@pytest.mark.parametrize(
    "line", ['scopes = ["infe"]', 'priority = "urgent"', "scope = 1", "quotas = {a = 1}"]
)
def test_a_wrong_identity_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "bear.toml").write_text(f'auth = "keys"\n[identities.a]\n{line}\n')
    with pytest.raises(ConfigError, match=r"identities|scope"):
        load_config(tmp_path / "bear.toml", environ={})


def test_files_of_tls_come_from_variables_and_flags_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "bear.toml").write_text('[tls]\ncertificate = "a"\nkey = "b"\n')
    environ = {"BEAR_TLS_KEY": "/env/key", "BEAR_TLS_CLIENT_CA": "/env/ca", "BEAR_SERVER_CA": "/no/setting"}
    flags = {"tls.client_ca": "/flag/ca"}
    settings = load_config(tmp_path / "bear.toml", flags, environ)
    assert settings.tls == Tls(Path("a"), Path("/env/key"), Path("/flag/ca"))
