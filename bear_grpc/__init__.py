"""bear_grpc: a gRPC server for GGUF language models.

A typed protobuf API (`bear_grpc.v1`), a worker process for each loaded model, llama.cpp as the engine.
The package itself imports nothing heavy: take what you need from its modules.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bear-grpc")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
