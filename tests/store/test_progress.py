"""How often progress is told, and what it predicts."""

from __future__ import annotations

import pytest

from bear_grpc.store.progress import INTERVAL_S, WINDOW_S, Meter
from bear_grpc.types import PullProgress, PullStage

TOTAL = 10_000


class Watch:
    """A meter on a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 50.0
        self.told: list[PullProgress] = []
        self.meter = Meter(TOTAL, self.told.append, lambda: self.now)

    def after(self, seconds: float, completed: int, stage: PullStage = PullStage.DOWNLOADING) -> None:
        self.now += seconds
        self.meter.tell(stage, completed)


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_first_progress_is_told_and_knows_no_rate(watch):
    watch.after(0, 7)
    assert watch.told == [PullProgress(PullStage.DOWNLOADING, 7, TOTAL)]


def test_progress_is_told_at_most_five_times_a_second(watch):
    for step in range(1, 1001):
        watch.after(0.01, step)
    assert 48 <= len(watch.told) <= 51
    assert INTERVAL_S == 0.2


def test_what_must_be_told_is_told_at_once(watch):
    watch.after(0, 1)
    watch.meter.tell(PullStage.DOWNLOADING, 2, at_once=True)
    watch.after(0, 3, PullStage.VERIFYING)
    assert [(progress.stage, progress.completed_bytes) for progress in watch.told] == [
        (PullStage.DOWNLOADING, 1),
        (PullStage.DOWNLOADING, 2),
        (PullStage.VERIFYING, 3),
    ]


def test_same_progress_is_not_told_twice(watch):
    watch.after(0, 5)
    watch.after(1, 5)
    watch.after(1, 5)
    assert len(watch.told) == 1


def test_rate_is_of_the_last_seconds_and_predicts_the_rest(watch):
    for step in range(20):
        watch.after(1, 100 * step)
    for step in range(10):
        watch.after(1, 1900 + 300 * step)
    last = watch.told[-1]
    assert last.bytes_per_s == pytest.approx(300)
    assert last.remaining_s == pytest.approx((TOTAL - last.completed_bytes) / 300)


def test_rate_of_a_stalled_download_goes_to_nothing(watch):
    watch.after(0, 0)
    watch.after(1, 1000)
    watch.after(1, 2000)
    for _ in range(20):
        watch.after(1, 2000)
    assert (watch.told[-1].bytes_per_s, watch.told[-1].remaining_s) == (0.0, 0.0)


def test_bytes_that_were_here_already_are_no_rate(watch):
    watch.after(0, 0)
    watch.meter.restart()
    watch.after(1, 5000)
    assert watch.told[-1].bytes_per_s == 0.0
    watch.after(1, 5100)
    assert watch.told[-1].bytes_per_s == pytest.approx(100)


def test_going_back_is_no_negative_rate(watch):
    watch.after(0, 5000)
    watch.after(1, 1000)
    watch.after(1, 1500)
    assert [progress.bytes_per_s for progress in watch.told] == [0.0, 0.0, pytest.approx(500)]
    assert WINDOW_S > 2
