"""Pulls in a child process that is killed anywhere, and what must be true afterwards.

Run as a program it is that child: endpoint, folder, and before which call of the system on the
folder it kills itself (0: never).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from bear_grpc.store.hub import Hub
from bear_grpc.store.store import Store
from tests.helpers.hub import StandInHub
from tests.helpers.pulls import REPO, SEGMENT, Puller, check_blobs, content, sha256_of

ROOT = Path(__file__).resolve().parents[2]
QUANT = "Q4_K_M"
MODEL = f"{REPO}:{QUANT}"
PARTS = {
    f"model-{QUANT}-00001-of-00002.gguf": content(5 * SEGMENT + 99, seed=1),
    f"model-{QUANT}-00002-of-00002.gguf": content(3 * SEGMENT + 7, seed=2),
}
BYTES = sum(map(len, PARTS.values()))
CALLS = 60  # of a pull of these files into an empty folder
TIMEOUT_S = 60

# What changes a folder or opens a file in it, as Python's audit hooks name it.
AUDITED = {
    *("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.chmod", "os.mkdir", "os.truncate"),
    "fcntl.flock",
}


@dataclass
class Outcome:
    """How many children were killed, and how many were done before."""

    killed: int = 0
    finished: int = 0


class Killing:
    """One child after the other on one folder, each killed where the seed says."""

    def __init__(self, stand_in: StandInHub, folder: Path, seed: int) -> None:
        self._stand_in, self._folder = stand_in, folder
        self._random = random.Random(seed)
        self.outcome = Outcome()
        for name, data in PARTS.items():
            stand_in.add(REPO, name, data)

    def run(self, count: int) -> None:
        """Kills `count` children. After each one, or after the next, a pull must succeed."""
        for number in range(count):
            if self._random.random() < 0.5:
                self._kill_at_bytes(self._random.randrange(BYTES))
            else:
                self._kill_at_call(self._random.randrange(1, CALLS))
            check_blobs(Store(self._folder))
            if number == count - 1 or self._random.random() < 0.6:
                self._finish()

    def run_everywhere(self) -> None:
        """Kills before every call of a pull into an empty folder, one after the other."""
        number = 0
        while not self.outcome.finished:
            number += 1
            self._kill_at_call(number)
            check_blobs(Store(self._folder))
            self._finish()

    def _kill_at_bytes(self, count: int) -> None:
        """Kills when the hub has sent so many bytes."""
        sent, lock, killed = 0, threading.Lock(), threading.Event()
        started = threading.Event()

        def on_chunk(_: int) -> None:
            nonlocal sent
            with lock:
                sent += 2**16
                if sent >= count and not killed.is_set():
                    started.wait(TIMEOUT_S)
                    child.kill()
                    killed.set()

        self._stand_in.fail(REPO, on_chunk=on_chunk)
        child = self._start(0)
        started.set()
        self._wait(child)
        self._stand_in.heal()

    def _kill_at_call(self, number: int) -> None:
        self._wait(self._start(number))

    def _start(self, call: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.helpers.pull_kills", self._stand_in.url, str(self._folder)]
        return subprocess.Popen([*command, str(call)], cwd=ROOT)

    def _wait(self, child: subprocess.Popen[bytes]) -> None:
        code = child.wait(TIMEOUT_S)
        assert code in (0, -signal.SIGKILL)
        if code:
            self.outcome.killed += 1
        else:
            self.outcome.finished += 1

    def _finish(self) -> None:
        """What is left must do for a pull; and what that leaves, for nothing but the model."""
        store = Store(self._folder)
        hub = Hub(endpoint=self._stand_in.url)
        manifest = Puller(store, hub).pull(MODEL)
        hub.close()
        check_blobs(store)
        first = store.path(manifest)
        assert {path.name: path.read_bytes() for path in first.parent.glob("*.gguf")} == PARTS
        assert {path.name for path in store.blobs.whole.iterdir()} == set(map(sha256_of, PARTS.values()))
        assert list(store.blobs.under_way.iterdir()) == []
        assert not store.blobs.quarantined.exists()
        store.prune(dry_run=False)
        assert store.is_whole(manifest)
        assert store.remove(MODEL) == BYTES
        shutil.rmtree(self._folder)


def main(endpoint: str, folder: str, call: str) -> None:
    calls, last = 0, int(call)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        if event in AUDITED and (event == "fcntl.flock" or folder in str(arguments[0])):
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    Puller(Store(Path(folder)), Hub(endpoint=endpoint)).pull(MODEL)


if __name__ == "__main__":
    main(*sys.argv[1:])
