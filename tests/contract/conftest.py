"""The backends that the contract is tried on: the fake, and llama.cpp with two small models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bear_grpc
from bear_grpc.backend.base import Backend
from bear_grpc.testing import FakeBackend
from bear_grpc.types import LoadOptions
from tests.helpers.ggufs import write_tiny_llama

MAX_SEQUENCES = 4
# One thread and plain attention: a sequence then gives the same bits in chunks of 2 tokens and more.
OPTIONS = LoadOptions(
    context_length=256,
    max_sequences=MAX_SEQUENCES,
    threads=1,
    batch_tokens=256,
    micro_batch_tokens=32,
    flash_attention=False,
)
DEMO = Path(bear_grpc.__file__).parent / "demo" / "bear-demo.gguf"

Open = Callable[[str], Backend]


@pytest.fixture(scope="session")
def open_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Loads a backend by name, once in a session."""
    opened: dict[str, Backend] = {}

    def load(name: str) -> Backend:
        if name == "fake":
            return FakeBackend(OPTIONS)
        from bear_grpc.backend import llama, native

        native.start()
        path = DEMO
        if name == "tiny":
            path = write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", n_layer=2, dtype="Q8_0")
        return llama.LlamaBackend(path, OPTIONS, cores=1, report=lambda stage, fraction: None)

    def get(name: str) -> Backend:
        if name not in opened:
            opened[name] = load(name)
        return opened[name]

    yield get
    for backend in opened.values():
        backend.close()


@pytest.fixture(
    params=[
        "fake",
        pytest.param("tiny", marks=pytest.mark.model),
        pytest.param("demo", marks=pytest.mark.model),
    ]
)
def backend(request: pytest.FixtureRequest, open_backend: Open) -> Iterator[Backend]:
    """A loaded backend with an empty KV cache."""
    loaded = open_backend(request.param)
    yield loaded
    loaded.clear_abort()
    for sequence_id in range(MAX_SEQUENCES):
        loaded.kv_remove(sequence_id, 0)
