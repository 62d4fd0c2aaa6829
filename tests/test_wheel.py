"""The wheel as a user gets it: complete, installable without this repository, serving at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tools import llama_wheel

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Installation:
    """A virtual environment that holds the wheel and what it depends on, nothing of this repository."""

    scripts: Path
    home: Path

    def command(self, *arguments: str) -> list[str]:
        return [str(self.scripts / "bear"), *arguments]

    def environment(self) -> dict[str, str]:
        """A user's environment: no settings of the tests' own, no path into the source tree."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BEAR_", "PYTHON"))}
        return {**kept, "HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / ".cache")}


def run(*command: str | Path) -> None:
    """Run a step of the installation; its output is shown when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", target, ROOT)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("installed")
    home = folder / "home"
    home.mkdir()
    run(sys.executable, "-m", "venv", folder / "venv")
    scripts = folder / "venv" / "bin"
    engine = llama_wheel.get_wheel(os.environ.get("ACCEL") or "cpu")
    run(scripts / "python", "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, engine, wheel)
    return Installation(scripts, home)


@pytest.fixture
def socket() -> Iterator[Path]:
    """A short path: the kernel takes 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bear-") as folder:
        yield Path(folder) / "bear.sock"


def wait_until_serving(address: str) -> None:
    """Follow grpc.health.v1 Watch of the whole server until it says SERVING."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="")
        watch = stub.Watch(request, timeout=START_TIMEOUT_S, wait_for_ready=True)
        try:
            for reply in watch:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            else:
                pytest.fail("health Watch ended before SERVING")
        finally:
            watch.cancel()
        checked = stub.Check(request, timeout=10)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING


def test_wheel_contents_are_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    generated = {f"bear_grpc/v1/{path.name}" for path in (ROOT / "bear_grpc" / "v1").glob("*.py*")}
    protos = {
        f"bear_grpc/protos/bear_grpc/v1/{path.name}" for path in ROOT.glob("protos/bear_grpc/v1/*.proto")
    }
    assert generated and protos
    expected = {"bear_grpc/py.typed", "bear_grpc/demo/bear-demo.gguf", "bear_grpc/demo/MODEL_CARD.md"}
    assert (expected | generated | protos) - names == set()
    outside = {name.split("/")[0] for name in names} - {"bear_grpc"}
    assert all(name.endswith(".dist-info") for name in outside), outside


def test_installed_server_generates_and_stops_cleanly(installation: Installation, socket: Path) -> None:
    address = f"unix:{socket}"
    log = installation.home / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            installation.command("serve", "--listen", address),
            cwd=installation.home,
            env=installation.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        try:
            wait_until_serving(address)
        except grpc.RpcError as error:
            pytest.fail(f"not serving: {error}\nexit code {server.poll()}\n{log.read_text()[-4000:]}")
        answer = subprocess.run(
            installation.command("run", "bear-demo", "What is GGUF?", "--server", address),
            cwd=installation.home,
            env=installation.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert answer.returncode == 0, f"{answer.stderr}\n{log.read_text()[-4000:]}"
        assert answer.stdout.strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_TIMEOUT_S) == 0, log.read_text()[-4000:]
        assert not socket.exists()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
