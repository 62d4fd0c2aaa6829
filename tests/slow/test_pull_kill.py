"""Many pulls killed at random moments, with fixed seeds; `chaos` is the same with as many as wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.hub import StandInHub
from tests.helpers.pull_kills import CALLS, Killing, Outcome

KILLS = 20
SEED = 11

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def chaos(folder: Path, kills: int, seed: int) -> Outcome:
    """Kills so many pulls into a folder; raises AssertionError if anything wrong is left."""
    with StandInHub() as stand_in:
        killing = Killing(stand_in, folder / "models", seed)
        killing.run(kills)
    return killing.outcome


def test_pulls_that_are_killed_at_random_moments_leave_nothing_wrong(tmp_path: Path) -> None:
    outcome = chaos(tmp_path, KILLS, SEED)
    assert outcome.killed > KILLS // 2


def test_pull_that_is_killed_before_any_of_its_calls_leaves_nothing_wrong(tmp_path: Path) -> None:
    with StandInHub() as stand_in:
        killing = Killing(stand_in, tmp_path / "models", SEED)
        killing.run_everywhere()
    assert killing.outcome.killed > CALLS // 2
