"""A worker on a kernel that has no Landlock; started as the real one is.

Imports nothing that starts threads: the sandbox comes before.
"""

from __future__ import annotations

import sys

from bear_grpc.types import SandboxMode
from bear_grpc.worker import landlock
from bear_grpc.worker.main import main

# Of a system call that no kernel has.
NONE = 100_000

if __name__ == "__main__":
    landlock._CREATE_RULESET = NONE
    main(int(sys.argv[1]), int(sys.argv[2]), SandboxMode(sys.argv[3]))
