"""`python -m bear_grpc.cli` is `bear`."""

from bear_grpc.cli import main

main()
