from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ggufs import write_tiny_llama


@pytest.fixture
def steady_file(tmp_path: Path) -> Path:
    """A model that computes for about a second on 500 tokens."""
    return write_tiny_llama(
        tmp_path / "steady.gguf",
        n_embd=256,
        n_layer=6,
        n_head=4,
        n_head_kv=4,
        n_ff=1024,
        context_length=2048,
    )
