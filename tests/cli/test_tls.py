"""`bear` over TLS: options before the verb, variables, and `grpcs://`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from bear_grpc.cli import app
from tests.client.fake_server import FakeServer
from tests.helpers.certificates import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secured(authority: Authority) -> Iterator[FakeServer]:
    """A server that asks for client certificates."""
    files = authority.server()
    pair = (files["key"].read_bytes(), files["certificate"].read_bytes())
    fake = FakeServer("127.0.0.1:0", grpc.ssl_server_credentials([pair], authority.pem, True))
    yield fake
    fake.stop()


@pytest.fixture
def client(authority: Authority, tmp_path: Path) -> dict[str, str]:
    """Files for a client, by the options that name them."""
    tls = authority.client("spiffe://test/cli")
    assert isinstance(tls.certificate, bytes)
    assert isinstance(tls.key, bytes)
    (tmp_path / "cert").write_bytes(tls.certificate)
    (tmp_path / "key").write_bytes(tls.key)
    names = {"--tls-ca": authority.file, "--tls-cert": tmp_path / "cert", "--tls-key": tmp_path / "key"}
    return {option: str(file) for option, file in names.items()}


def run(*args: str, **environ: str) -> Result:
    return CliRunner().invoke(app, args, prog_name="bear", env=environ, catch_exceptions=False)


def options(files: dict[str, str]) -> list[str]:
    return [word for pair in files.items() for word in pair]


@pytest.mark.parametrize("scheme", ["", "grpcs://"])
def test_files_may_be_options(scheme: str, secured: FakeServer, client: dict[str, str]) -> None:
    result = run("--server", scheme + secured.target, *options(client), "health")
    assert (result.exit_code, result.stdout) == (0, "SERVING\n")


def test_files_may_be_variables(secured: FakeServer, client: dict[str, str]) -> None:
    result = run(
        "health",
        BEAR_SERVER=f"grpcs://{secured.target}",
        BEAR_SERVER_CA=client["--tls-ca"],
        BEAR_CLIENT_CERTIFICATE=client["--tls-cert"],
        BEAR_CLIENT_KEY=client["--tls-key"],
    )
    assert (result.exit_code, result.stdout) == (0, "SERVING\n")


@pytest.mark.parametrize("given", [("--tls",), ("--tls-ca",), ()])
def test_what_fails_is_one_line(given: tuple[str, ...], secured: FakeServer, client: dict[str, str]) -> None:
    words = [word for option in given for word in (option, *([client[option]] if option in client else []))]
    result = run("--server", secured.target, *words, "health")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "[SERVER_UNREACHABLE]" in result.stderr
    assert ("not trusted" in result.stderr) == (given == ("--tls",))


def test_a_file_that_is_not_there_is_wrong_usage(secured: FakeServer) -> None:
    result = run("--server", secured.target, "--tls-ca", "/no/such/file", "health")
    assert result.exit_code == 2
    assert "/no/such/file: No such file" in result.stderr


def test_half_a_client_certificate_is_wrong_usage(secured: FakeServer, client: dict[str, str]) -> None:
    result = run("--server", secured.target, "--tls-cert", client["--tls-cert"], "health")
    assert result.exit_code == 2
    assert "needs its key" in result.stderr
