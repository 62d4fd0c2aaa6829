"""The worker process: one model, three threads. Imports no grpc and no hub."""
