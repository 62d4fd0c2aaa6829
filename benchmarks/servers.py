"""Runs the servers that are measured: ours and the peer's, each as the process that a user starts."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bear_grpc.access.caller import Quotas, Scope
from bear_grpc.access.keys import KeyStore
from bear_grpc.client import Client
from bear_grpc.v1.types_pb2 import ModelStatus
from benchmarks.cache import SetupError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
CHECKSUM_TIMEOUT_S = 60.0
POLL_S = 0.002
# Each is counted, none is reached.
QUOTAS = Quotas(
    requests_per_minute=10**6, tokens_per_minute=10**9, concurrent_streams=10**4, tokens_per_day=10**12
)


@dataclass(frozen=True)
class Bear:
    """A running `bear serve`. `started_s` is when it was started, on time.perf_counter's clock.

    `key` is a key that may do everything there, where the server asks for one; `metrics` an address, where
    it has one.
    """

    target: str
    pid: int
    started_s: float
    key: str = ""
    metrics: str = ""

    def client(self) -> Client:
        """With the key."""
        return Client(self.target, api_key=self.key or None)

    def worker_pid(self, model: str) -> int:
        with self.client() as client:
            return client.get_model_status(model).status.worker_process_id


@contextlib.contextmanager
def bear(*arguments: str, settings: Mapping[str, str] | None = None) -> Iterator[Bear]:
    """`bear serve` with these arguments and `BEAR_*` variables, on a unix socket, with folders of its own.

    Gives it as soon as the process is there; `wait_until_serving` waits.
    """
    with tempfile.TemporaryDirectory(prefix="bear-") as folder:
        target = f"unix:{folder}/s"
        command = [sys.executable, "-m", "bear_grpc.cli", "serve", "--listen", target]
        command += ["--models-dir", f"{folder}/models", *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BEAR_")}
        environment |= {"BEAR_STATE_DIR": f"{folder}/state", **(settings or {})}
        started = time.perf_counter()
        with _process(command, Path(folder) / "log", environment) as process:
            yield Bear(target, process.pid, started)


@contextlib.contextmanager
def equipped(*arguments: str) -> Iterator[Bear]:
    """`bear serve` with what it has for production: keys, quotas, metrics, logs, usage, the audit log."""
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="bear-") as folder:
        with KeyStore(Path(folder)) as keys:
            _, key = keys.create(scopes=frozenset(Scope), quotas=QUOTAS)
        settings = {"BEAR_STATE_DIR": folder, "BEAR_AUTH": "keys", "BEAR_METRICS_LISTEN": address}
        with bear(*arguments, settings=settings) as server:
            yield dataclasses.replace(server, key=key, metrics=address)


def wait_until_serving(server: Bear) -> float:
    """Waits for health SERVING; the seconds since the server was started.

    Raises:
        SetupError: it does not come up.
    """
    # A channel that finds no socket waits a second before it tries again: no good for a clock.
    socket_file = Path(server.target.removeprefix("unix:"))
    deadline = server.started_s + START_TIMEOUT_S
    while not socket_file.exists():
        if time.perf_counter() > deadline or not _alive(server.pid):
            raise SetupError("bear serve does not listen")
        time.sleep(POLL_S)
    try:
        with grpc.insecure_channel(server.target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            for answer in stub.Watch(request, timeout=START_TIMEOUT_S, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return time.perf_counter() - server.started_s
    except grpc.RpcError as failed:
        raise SetupError(f"bear serve does not serve: {failed}") from failed
    raise SetupError("bear serve ended before it served")


def register(client: Client, name: str, file: Path) -> None:
    """Registers a model, and waits for the checksum that is computed of it: not while we measure.

    Raises:
        SetupError: no checksum comes.
    """
    client.register_model(name, str(file))
    deadline = time.monotonic() + CHECKSUM_TIMEOUT_S
    while not client.get_model(name).model.sha256:
        if time.monotonic() > deadline:
            raise SetupError(f"{name} has no checksum after {CHECKSUM_TIMEOUT_S:.0f} s")
        time.sleep(0.05)


def held_tokens(found: ModelStatus) -> int:
    """Tokens in the KV cache that belong to a request; not those of prefixes that are kept for later ones."""
    return found.kv_cache_used_token_count - found.kv_cache_idle_token_count


@dataclass(frozen=True)
class LlamaServer:
    """A running llama-server that answers; `ready_s` is what that took from its start."""

    port: int
    pid: int
    ready_s: float


@contextlib.contextmanager
def llama_server(program: Path, model: Path, arguments: Sequence[str] = ()) -> Iterator[LlamaServer]:
    """llama-server with a model loaded; ready when /health says so.

    Raises:
        SetupError: it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        port = free_port()
        command: list[str | Path] = [program, "--model", model, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--offline", *arguments]
        started = time.perf_counter()
        with _process(command, Path(folder) / "log", dict(os.environ)) as process:
            while not _healthy(port):
                if process.poll() is not None or time.perf_counter() > started + START_TIMEOUT_S:
                    raise SetupError("llama-server does not come up")
                time.sleep(POLL_S)
            yield LlamaServer(port, process.pid, time.perf_counter() - started)


@contextlib.contextmanager
def _process(
    command: Sequence[str | Path], log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block; what it said is in the error if the block fails."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    except SetupError as error:
        said = log.read_text(errors="replace").splitlines()[-15:]
        raise SetupError("\n  | ".join([str(error), *said])) from error
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """One on which nobody listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _alive(pid: int) -> bool:
    try:
        # A child that has ended and was not waited for is still there.
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
