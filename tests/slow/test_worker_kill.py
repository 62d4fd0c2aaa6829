"""Many deaths of workers at random moments, with fixed seeds; `chaos` is the same with as many as wanted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bear_grpc.executor.spawner import Spawner
from tests.helpers.worker_kills import HEARTBEAT_TIMEOUT_S, STOP_SLACK_S, Outcome, kill_workers

ROUNDS = 10
SEED = 12

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]


def chaos(folder: Path, rounds: int, seed: int) -> Outcome:
    """Kills so many workers; raises AssertionError for a stream that ends otherwise than it should."""
    spawner = Spawner()
    try:
        return asyncio.run(kill_workers(folder, spawner, rounds, seed))
    finally:
        spawner.close()
        spawner.join()


def test_streams_of_workers_that_are_killed_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    outcome = chaos(tmp_path, ROUNDS, SEED)
    assert outcome.deaths == ROUNDS
    assert outcome.cut > ROUNDS
    assert max(outcome.stopped_s) <= HEARTBEAT_TIMEOUT_S + STOP_SLACK_S
