"""`python -m bear_grpc.worker FD`: started by the server's spawner only."""

import sys

from .main import main

main(int(sys.argv[1]))
