"""A worker whose native code fails when it computes a certain prompt; started as the real one is.

Imports nothing that starts threads: the sandbox comes before.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from bear_grpc.protocol import Frame, Load, Progress
from bear_grpc.types import LoadStage, SandboxMode
from bear_grpc.worker.main import main

# Prompts that begin with these tokens end the worker in their way.
ABORTS, SEGFAULTS, IS_KILLED, HANGS = (77, 78, 79), (77, 78, 80), (77, 78, 81), (77, 78, 82)
# This one has it take GROWTH_BYTES for a moment.
GROWS, GROWTH_BYTES = (77, 78, 83), 256 << 20
# A model of this file name is loaded when SIGUSR2 has come, not before.
SLOW = "slow.gguf"

_may_load = threading.Event()


def poisoned(load: Load, post: Callable[[Frame], None]) -> Any:
    """The real backend, with a fault in it."""
    import numpy as np

    from bear_grpc.backend.native import lib
    from bear_grpc.worker.process import load_llama

    if load.path.endswith(SLOW):
        post(Progress(LoadStage.WEIGHTS, 0.5))
        _may_load.wait()
    backend = load_llama(load, post)
    forward = backend.forward

    def faulty(batch: Any) -> Any:
        tokens = np.ascontiguousarray(batch.tokens[: batch.size], np.int32).tobytes()
        if np.array(ABORTS, np.int32).tobytes() in tokens:
            lib._lib.ggml_abort(b"poison.c", 7, b"poisoned")
        if np.array(SEGFAULTS, np.int32).tobytes() in tokens:
            signal.raise_signal(signal.SIGSEGV)  # on this thread, as a fault is
        if np.array(IS_KILLED, np.int32).tobytes() in tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if np.array(HANGS, np.int32).tobytes() in tokens:
            threading.Event().wait()
        if np.array(GROWS, np.int32).tobytes() in tokens:
            bytearray(GROWTH_BYTES)[:: mmap.PAGESIZE] = b"\x01" * (GROWTH_BYTES // mmap.PAGESIZE)
        return forward(batch)

    backend.forward = faulty  # type: ignore[method-assign]
    return backend


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, lambda *_: _may_load.set())
    main(int(sys.argv[1]), int(sys.argv[2]), SandboxMode(sys.argv[3]), poisoned)
