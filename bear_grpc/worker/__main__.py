"""`python -m bear_grpc.worker FD SANDBOX`: started by the server's spawner only."""

import sys

from ..types import SandboxMode
from .main import main

main(int(sys.argv[1]), SandboxMode(sys.argv[2]))
