"""A worker that computes nothing and takes its time for it; started as the real one is.

Imports nothing that starts threads: the sandbox comes before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from bear_grpc.protocol import Frame, Load
from bear_grpc.types import SandboxMode
from bear_grpc.worker.main import main

# What a step takes, whatever is in it: the load of the machine hardly matters.
STEP_S = 0.02


def paced(load: Load, post: Callable[[Frame], None]) -> Any:
    """The fake backend, whose steps all take the same time."""
    from bear_grpc.testing import FakeBackend

    backend = FakeBackend(load.options)
    forward = backend.forward

    def slow(batch: Any) -> Any:
        time.sleep(STEP_S)
        return forward(batch)

    backend.forward = slow  # type: ignore[method-assign]
    return backend


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), SandboxMode(sys.argv[3]), paced)
