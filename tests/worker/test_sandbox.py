"""The real worker main in the real sandbox: what a model tries to do there, and that it works."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bear_grpc.framing import FrameBuffer, encode
from bear_grpc.params import PromptInput, StopParams
from bear_grpc.protocol import (
    Confined,
    Costs,
    Failed,
    Finished,
    Frame,
    Heartbeat,
    Load,
    Progress,
    Ready,
    Step,
    Submit,
)
from bear_grpc.testing.escape import DONE, MARK
from bear_grpc.types import CostTable, LoadOptions, SandboxMode, SandboxState, StepCost
from tests.engine.harness import GREEDY

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 60
OPTIONS = LoadOptions(context_length=256, max_sequences=2, batch_tokens=32, threads=1, repack=False)
KNOWN = [CostTable(repack=False, threads=1, costs=[StepCost(1, 0.001)])]
TOKENS = 40
THREADS = {"io", "owner, loading", "owner", "text", "new"}
REFUSED = {"EPERM", "EACCES"}


class Confinee:
    """A worker process, and the server's end of its socket."""

    def __init__(self, folder: Path, mode: SandboxMode, without: str) -> None:
        self._folder = folder
        self._peer, theirs = socket.socketpair()
        self._peer.settimeout(WAIT_S)
        self._buffer = FrameBuffer(to_worker=False)
        self._frames: list[Frame] = []
        arguments = [str(theirs.fileno()), mode, str(folder), *([without] if without else [])]
        with theirs, (folder.parent / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.confined_worker", *arguments],
                pass_fds=[theirs.fileno()],
                stderr=stderr,
                cwd=ROOT,
            )

    def load(self) -> None:
        model = self._folder / "model.gguf"
        self.send(Load("bear", str(model), OPTIONS, cores=2, cost_tables=KNOWN))

    def send(self, frame: Frame) -> None:
        self._peer.sendall(encode(frame))

    def next(self, kind: type[Frame]) -> Frame:
        while True:
            while not self._frames:
                data = self._peer.recv(65536)
                assert data, self._said()
                self._frames += self._buffer.feed(data)
            frame = self._frames.pop(0)
            if isinstance(frame, kind):
                return frame
            assert isinstance(frame, Heartbeat | Progress | Costs), frame

    def generate(self) -> list[int]:
        stop = StopParams(max_tokens=TOKENS, ignore_eos=True)
        self.send(Submit(1, PromptInput("hello", add_special=False), GREEDY, stop, 0.0, credit=1000))
        texts = []
        while True:
            for event in self.next(Step).events:
                if isinstance(event, Finished):
                    assert event.usage.completion_tokens == TOKENS
                    return texts
                texts.append(getattr(event, "text", ""))

    def signal(self) -> None:
        os.kill(self._process.pid, signal.SIGUSR2)

    def end(self) -> dict[str, dict[str, str]]:
        """What came of the attempts, by thread."""
        self._peer.close()
        try:
            assert self._process.wait(WAIT_S) == 0, self._said()
        finally:
            self._process.kill()
            self._process.wait()
        lines = [line.removeprefix(MARK) for line in self._said().splitlines() if line.startswith(MARK)]
        return {told["thread"]: told["found"] for told in map(json.loads, lines)}

    def _said(self) -> str:
        return (self._folder.parent / "stderr").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "files"
    made.mkdir()
    (made / "secret").write_bytes(b"of somebody else")
    (made / "spare").write_bytes(b"")
    (made / "model.gguf").write_bytes(b"GGUF")
    yield made


def run(
    folder: Path, mode: SandboxMode, without: str = ""
) -> tuple[Confined, list[int], dict[str, dict[str, str]]]:
    worker = Confinee(folder, mode, without)
    try:
        worker.load()
        confined = worker.next(Confined)
        worker.next(Ready)
        worker.signal()
        texts = worker.generate()
    finally:
        found = worker.end()
    assert isinstance(confined, Confined)
    return confined, texts, found


linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@linux
def test_everything_is_refused_on_every_thread_and_generation_works(folder):
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    confined, texts, found = run(folder, SandboxMode.AUTO)
    assert (confined.state, confined.problem) == (SandboxState.ON, "")
    assert confined.landlock_abi >= 1
    assert set(found) == THREADS
    for thread, results in found.items():
        assert {name: told for name, told in results.items() if told not in REFUSED} == {}, thread
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before
    assert texts


@linux
def test_the_same_is_done_without_a_sandbox(folder):
    confined, texts, found = run(folder, SandboxMode.OFF)
    assert confined.state is SandboxState.OFF
    assert "setting" in confined.problem
    wanted = {
        *("tcp", "unix", "read", "list", "root", "users", "environment"),
        *("write", "truncate", "folder", "link", "mode", "fork", "spawn", "signal"),
    }
    for results in found.values():
        assert {name for name in wanted if results[name] != DONE} == set()
    assert set(found) == THREADS
    assert texts


@linux
@pytest.mark.parametrize("without", ["landlock", "seccomp"])
def test_half_a_sandbox_is_told_and_not_enough_where_it_is_required(folder, without):
    worker = Confinee(folder, SandboxMode.REQUIRE, without)
    worker.load()
    confined = worker.next(Confined)
    assert (confined.state, confined.problem) == (
        SandboxState.PARTIAL,
        f"{without}: not on this kernel",
    )
    failed = worker.next(Failed)
    assert failed.error.reason == "SANDBOX_UNAVAILABLE"
    assert worker.end() == {}


@linux
def test_a_server_that_closes_before_the_first_frame_leaves_no_worker(folder):
    worker = Confinee(folder, SandboxMode.AUTO, "")
    assert worker.end() == {}
