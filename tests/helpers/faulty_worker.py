"""A worker whose native code aborts when it computes a certain prompt; started as the real one is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from bear_grpc.backend.base import Backend, Batch, Outcome
from bear_grpc.protocol import Frame, Load
from bear_grpc.worker import main, process

# Prompts that begin with these tokens end the worker in their way.
ABORTS, SEGFAULTS, IS_KILLED, HANGS = (77, 78, 79), (77, 78, 80), (77, 78, 81), (77, 78, 82)


def poisoned(load: Load, post: Callable[[Frame], None]) -> Backend:
    """The real backend, with a fault in it."""
    from bear_grpc.backend.native import lib

    backend = process.load_llama(load, post)
    forward = backend.forward

    def faulty(batch: Batch) -> Outcome:
        tokens = np.ascontiguousarray(batch.tokens[: batch.size], np.int32).tobytes()
        if np.array(ABORTS, np.int32).tobytes() in tokens:
            lib._lib.ggml_abort(b"poison.c", 7, b"poisoned")
        if np.array(SEGFAULTS, np.int32).tobytes() in tokens:
            signal.raise_signal(signal.SIGSEGV)  # on this thread, as a fault is
        if np.array(IS_KILLED, np.int32).tobytes() in tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if np.array(HANGS, np.int32).tobytes() in tokens:
            threading.Event().wait()
        return forward(batch)

    backend.forward = faulty  # type: ignore[method-assign]
    return backend


def run() -> None:
    real = process.Worker

    def make(sock: Any, **rest: Any) -> process.Worker:
        return real(sock, poisoned, **rest)

    process.Worker = make  # type: ignore[misc, assignment]
    main.main(*map(int, sys.argv[1:]))


if __name__ == "__main__":
    run()
