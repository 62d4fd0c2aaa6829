"""A pull that is killed at any moment leaves what the next one can use, and nothing wrong."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.hub import StandInHub
from tests.helpers.pull_kills import Killing

KILLS = 6


def test_killed_pull_can_be_finished_and_leaves_nothing_wrong(stand_in: StandInHub, tmp_path: Path) -> None:
    killing = Killing(stand_in, tmp_path / "models", seed=4)
    killing.run(KILLS)
    # A child that finds much of the model there may be done before its moment comes.
    assert killing.outcome.killed >= KILLS // 2
