"""`python -m bear_grpc.worker FD PAGE`: started by the server's spawner only."""

import sys

from .main import main

main(int(sys.argv[1]), int(sys.argv[2]))
