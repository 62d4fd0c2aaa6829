"""A twentieth of the benchmark's cycles: loading and unloading leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.bars.cycles import GROWTH_BYTES, LEDGER_PERCENT, Cycles, cycles
from tests.helpers.ggufs import write_tiny_llama

COUNT = 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Cycles:
    folder: Path = tmp_path_factory.mktemp("cycles")
    return cycles(write_tiny_llama(folder / "tiny.gguf"), COUNT)


def test_server_does_not_grow(seen: Cycles) -> None:
    assert seen.growth <= GROWTH_BYTES


def test_no_process_and_no_file_is_left(seen: Cycles) -> None:
    assert (max(seen.children), seen.more_files) == (0, 0)


def test_ledger_agrees_with_the_system(seen: Cycles) -> None:
    assert max(seen.ledger_percent) <= LEDGER_PERCENT


def test_file_is_never_touched(seen: Cycles) -> None:
    assert not seen.is_file_touched
