"""A worker that cannot write a word to its log; started as the real one is."""

from __future__ import annotations

import os
import sys

from bear_grpc.types import SandboxMode
from bear_grpc.worker.main import main

if __name__ == "__main__":
    os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stderr.fileno())
    main(int(sys.argv[1]), int(sys.argv[2]), SandboxMode(sys.argv[3]))
