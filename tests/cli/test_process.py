"""`bear` as a process: signals, closed pipes, and what its start costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bear_grpc.v1.model_service_pb2 import CancelPullRequest
from tests.client import samples
from tests.client.fake_server import WAIT_S, FakeServer

BEAR = (sys.executable, "-m", "bear_grpc.cli")


@pytest.fixture
def heard_sigint() -> Iterator[None]:
    """Children get SIGINT's default even if these tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def answering(server: FakeServer, heard_sigint: None) -> Iterator[subprocess.Popen[bytes]]:
    """A `bear run` in the middle of an answer that does not end by itself."""
    server.endless = True
    process = subprocess.Popen(
        [*BEAR, "run", "plain", "Hi"],
        env={**os.environ, "BEAR_SERVER": server.target},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(5) == b"Hello"
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_cancels_the_call_and_exits_130(
    server: FakeServer, answering: subprocess.Popen[bytes]
) -> None:
    answering.send_signal(signal.SIGINT)
    _, err = answering.communicate(timeout=WAIT_S)
    assert answering.returncode == 130
    assert err == b""
    assert server.cancelled.wait(WAIT_S)


def test_ctrl_c_in_a_download_leaves_it_to_the_server(server: FakeServer, heard_sigint: None) -> None:
    server.endless = True
    server.pulled = [samples.PULL_STARTED]
    process = subprocess.Popen(
        [*BEAR, "pull", "tiny"],
        env={**os.environ, "BEAR_SERVER": server.target},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("tiny: 640 MiB")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "`bear pull --cancel tiny` stops it" in err
    assert server.cancelled.wait(WAIT_S)
    assert not any(isinstance(request, CancelPullRequest) for request in server.requests)


def test_help_and_bad_usage_import_no_grpc() -> None:
    code = (
        "import sys; from bear_grpc.cli import app\n"
        "for args in (['--help'], ['load', '--help'], ['run']):\n"
        "    try: app(args)\n"
        "    except SystemExit: pass\n"
        "sys.exit('grpc' in sys.modules or 'google.protobuf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_reader_that_goes_ends_the_command_quietly(server: FakeServer) -> None:
    # More than a pipe and the buffers on the way hold, so that a write fails.
    server.texts = ["x" * 65_536] * 16
    process = subprocess.Popen(
        [*BEAR, "run", "plain", "Hi"],
        env={**os.environ, "BEAR_SERVER": server.target},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(WAIT_S) == 141
    assert err == b""


def test_a_reader_that_is_gone_before_the_first_line_ends_it_quietly(server: FakeServer) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stdout:
        done = subprocess.run(
            [*BEAR, "list"],
            env={**os.environ, "BEAR_SERVER": server.target},
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 141
    assert done.stderr == b""
