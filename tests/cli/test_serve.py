"""`bear serve` hands its flags to the configuration, and the server's exit code to the shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bear_grpc.config import ServerConfig
from bear_grpc.transport import Tls
from tests.cli.conftest import Bear
from tests.cli.test_process import BEAR
from tests.client.fake_server import WAIT_S


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """The configurations that would be served, here by a server that ends at once with 3."""
    configs: list[ServerConfig] = []

    def serve(config: ServerConfig, reread: object, hangups: object) -> int:
        configs.append(config)
        return 3

    server = ModuleType("bear_grpc.serving")
    server.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bear_grpc.serving", server)
    return configs


def test_without_flags_the_defaults_are_served(bear: Bear, served: list[ServerConfig]) -> None:
    assert bear("serve").exit_code == 3
    assert served[0].listen == ["127.0.0.1:50051"]


def test_flags_are_handed_on(bear: Bear, served: list[ServerConfig]) -> None:
    bear(
        *("serve", "--listen", "127.0.0.1:1", "--listen", "unix:/s", "--load", "a", "--load", "b"),
        *("--models-dir", "/m", "--allow-path", "/x", "--allow-path", "/y"),
    )
    [config] = served
    assert config.listen == ["127.0.0.1:1", "unix:/s"]
    assert config.load == ["a", "b"]
    assert config.models_dir == Path("/m")
    assert config.allow_path == [Path("/x"), Path("/y")]


def test_flags_of_tls_are_handed_on(bear: Bear, served: list[ServerConfig]) -> None:
    files = ("--tls-cert", "/c", "--tls-key", "/k", "--tls-client-ca", "/ca")
    bear("serve", "--listen", "0.0.0.0:1", *files)
    bear("serve", "--listen", "0.0.0.0:1", "--insecure-public")
    mutual, bare = served
    assert (mutual.tls, mutual.insecure_public) == (Tls(Path("/c"), Path("/k"), Path("/ca")), False)
    assert (bare.tls, bare.insecure_public) == (Tls(), True)


def test_a_public_address_alone_is_refused(bear: Bear, served: list[ServerConfig]) -> None:
    result = bear("serve", "--listen", "0.0.0.0:1")
    assert result.exit_code == 78
    assert "insecure_public" in result.stderr
    assert served == []


def test_a_flag_comes_before_the_file(bear: Bear, served: list[ServerConfig], tmp_path: Path) -> None:
    file = tmp_path / "bear.toml"
    file.write_text('listen = ["127.0.0.1:1"]\nload = ["a"]\n')
    bear("serve", "--config", str(file), "--load", "b")
    assert (served[0].listen, served[0].load) == (["127.0.0.1:1"], ["b"])


def test_wrong_settings_are_one_line_and_exit_78(
    bear: Bear, served: list[ServerConfig], tmp_path: Path
) -> None:
    file = tmp_path / "bear.toml"
    file.write_text('lisen = ["127.0.0.1:1"]\n')
    result = bear("serve", "--config", str(file))
    assert result.exit_code == 78
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert served == []


def test_a_server_answers_and_ends_with_sigterm(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BEAR_")}
    environ["BEAR_STATE_DIR"] = str(tmp_path / "state")
    process = subprocess.Popen(
        [*BEAR, "serve", "--listen", target, "--models-dir", str(tmp_path / "models")],
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        assert any("serves on" in line for line in process.stderr)
        asked = subprocess.run(
            [*BEAR, "health", "--server", target],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        assert (asked.stdout, asked.returncode) == ("SERVING\n", 0)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
