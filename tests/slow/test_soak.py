"""A twentieth of the benchmark's soak: nothing grows, nothing is left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from benchmarks.bars.soak import (
    GROWTH_BYTES,
    Sample,
    Soak,
    of_server,
    of_worker,
    server_bytes,
    soak,
    worker_bytes,
)
from benchmarks.procfs import Usage
from benchmarks.servers import held_tokens

GENERATIONS = 250
WARM_UP = 25

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def seen() -> Soak:
    return soak(GENERATIONS, WARM_UP, every=25)


@pytest.mark.parametrize("memory", [server_bytes, worker_bytes])
def test_memory_does_not_grow(seen: Soak, memory: Callable[[Sample], int]) -> None:
    assert seen.growth(memory) <= GROWTH_BYTES


@pytest.mark.parametrize("process", [of_server, of_worker])
def test_no_open_file_is_left(seen: Soak, process: Callable[[Sample], Usage]) -> None:
    assert seen.more(process, "open_files") == 0


def test_no_request_and_no_cell_is_left(seen: Soak) -> None:
    assert (seen.status.running_count, seen.status.waiting_count) == (0, 0)
    assert held_tokens(seen.status) == 0
