"""Downloads of a stand-in's files: contents, a store with its hub, and a limiter that holds them."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bear_grpc.store.hub import Hub
from bear_grpc.store.manifests import Manifest
from bear_grpc.store.pull import Pull, RateLimiter
from bear_grpc.store.reference import parse_reference
from bear_grpc.store.store import Store
from bear_grpc.types import PullProgress

REPO = "owner/repo"
FILE = "model.Q4_K_M.gguf"
NAME = f"{REPO}/{FILE}"
SEGMENT = 2**18  # of the files that tests use
WAIT_S = 30


def content(size: int, seed: int = 1) -> bytes:
    """Bytes that are alike in no two places."""
    return random.Random(seed).randbytes(size)


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Gate:
    """A limiter's `wait` that lets so many bytes through and then holds everybody until it is opened."""

    def __init__(self, count: int) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self._count = count
        # With a clock that stands still, the delay is the number of all bytes so far.
        self.limiter = RateLimiter(1.0, clock=lambda: 0.0, wait=self._wait)

    def _wait(self, stop: threading.Event, delay: float) -> None:
        if delay > self._count:
            self.reached.set()
            while not self.opened.wait(0.01) and not stop.is_set():
                pass


@dataclass
class Puller:
    """Makes pulls into one store; what they tell is in `progress`."""

    store: Store
    hub: Hub
    progress: list[PullProgress] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    limiter: RateLimiter = field(default_factory=RateLimiter)
    free: Callable[[Path], int] = lambda folder: 2**50
    clock: Callable[[], float] | None = None

    def pull(self, name: str = NAME) -> Manifest:
        reference = parse_reference(name)
        assert reference is not None
        return Pull(
            self.store,
            self.hub,
            self.hub.resolve(reference),
            limiter=self.limiter,
            stop=self.stop,
            on_progress=self.progress.append,
            pause=lambda attempt: 0.0,
            free=self.free,
            **({} if self.clock is None else {"clock": self.clock}),
        ).run()

    def data(self, name: str = NAME) -> bytes:
        """What a pull brings, as it lies in the store."""
        return self.store.path(self.pull(name)).read_bytes()


class Background(threading.Thread):
    """A call in a thread; `result` waits for what it gives or raises."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call
        self._result: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as exc:
            self._error = exc

    def result(self) -> object:
        self.join(WAIT_S)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


def check_blobs(store: Store) -> None:
    """No file has a good name without being what it says."""
    for path in sorted(store.blobs.whole.glob("*")):
        assert sha256_of(path.read_bytes()) == path.name
    for manifest in store.manifests():
        assert store.is_whole(manifest)
