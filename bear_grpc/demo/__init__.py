"""The embedded demo model, and `python -m bear_grpc.demo`, which shows the whole way once."""
