"""`python -m bear_grpc.worker FD PAGE SANDBOX`: started by the server's spawner only."""

import sys

from ..types import SandboxMode
from .main import main

main(int(sys.argv[1]), int(sys.argv[2]), SandboxMode(sys.argv[3]))
