"""The record of what was used: kept over restarts, added to by every flush, never in the way."""

from __future__ import annotations

import logging
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from bear_grpc.access.caller import Caller
from bear_grpc.access.quotas import DAY_S
from bear_grpc.access.usage import FILE, Group, Totals, UsageError, UsageStore, day_of
from bear_grpc.rpc import usage as module
from bear_grpc.rpc.call import Call
from bear_grpc.rpc.usage import UsageObserver
from bear_grpc.testing.clock import FakeClock
from bear_grpc.types import Usage

DAY = "2026-11-29"
NOON = 1_795_953_600.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def ended(
    key: str = "one",
    model: str = "tiny",
    code: str = "OK",
    method: str = "Generate",
    is_known: bool = True,
    **told: int,
) -> Call:
    return Call(
        f"/bear_grpc.v1.InferenceService/{method}",
        caller=Caller(id=key),
        code=code,
        model=model,
        ready_s=0.0 if code == "NOT_FOUND" else 1.0,
        usage=Usage(10, 4, 7),
        is_known=is_known,
        **told,  # type: ignore[arg-type]
    )


def counting(folder: Path, clock: FakeClock | None = None, days: int = 400) -> UsageObserver:
    """An observer that writes when it is told to."""
    observer = UsageObserver(folder, days, clock or FakeClock(NOON))
    observer._thread = module.threading.Thread()  # none of its own
    return observer


def kept(folder: Path) -> dict[Group, Totals]:
    with UsageStore(folder) as store:
        return store.read()


def test_days_are_those_of_utc() -> None:
    assert day_of(NOON) == DAY
    assert [day_of(NOON + DAY_S / 2 - 1), day_of(NOON + DAY_S / 2)] == [DAY, "2026-11-30"]
    assert day_of(NOON, 29) == "2026-10-31"


def test_sums_are_added_up_and_outlive_the_process(folder: Path) -> None:
    one, other = Group(DAY, "one", "tiny"), Group(DAY, "one", "demo")
    for _ in range(2):
        with UsageStore(folder) as store:
            store.add({one: Totals(1, 2, 3, 4, 5), other: Totals(1)})
            store.add({one: Totals(1, 1, 1, 1, 1)})
    assert kept(folder) == {one: Totals(4, 6, 8, 10, 12), other: Totals(2)}
    assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600


def test_reading_chooses_and_makes_no_file(folder: Path) -> None:
    assert kept(folder) == {} and not folder.exists()
    groups = [
        Group(day, key, model) for day in (DAY, "2026-11-30") for key in ("a", "") for model in ("x", "")
    ]
    with UsageStore(folder) as store:
        store.add({group: Totals(1, 5, 2, 7) for group in groups})
        assert set(store.read("2026-11-30")) == {each for each in groups if each.day == "2026-11-30"}
        assert set(store.read(key_id="", model="x")) == {
            g for g in groups if (g.key_id, g.model) == ("", "x")
        }
        assert store.tokens_on(DAY) == {"a": 24, "": 24}


def test_calls_are_counted_by_what_became_of_them(folder: Path) -> None:
    observer = counting(folder)
    observer.end(ended())
    observer.end(ended(code="CANCELLED", told_tokens=9))  # one of its answers had not ended
    observer.end(ended(code="UNAVAILABLE"))
    observer.end(ended(model="made up", code="NOT_FOUND"))
    for code in ("UNAUTHENTICATED", "CANCELLED"):  # the second: it did not wait for the answer
        observer.end(ended(key="", code=code, is_known=False))
    observer.end(ended(key=""))
    elsewhere = ended()
    elsewhere.method = "/bear_grpc.v1.ModelService/LoadModel"
    observer.end(elsewhere)
    assert observer.flush()
    assert kept(folder) == {
        Group(DAY, "one", "tiny"): Totals(3, 30, 12, 23, 1),
        Group(DAY, "one", ""): Totals(1, 10, 4, 7, 1),
        Group(DAY, "", "tiny"): Totals(1, 10, 4, 7, 0),
    }
    assert observer.tokens_today() == {"one": 70, "": 17}


def test_old_days_are_forgotten(folder: Path) -> None:
    clock = FakeClock(NOON)
    observer = counting(folder, clock, days=2)
    for _ in range(4):
        observer.end(ended())
        observer.flush()
        clock.advance(DAY_S)
    assert [group.day for group in kept(folder)] == ["2026-12-01", "2026-12-02"]


def test_clock_that_jumps_ahead_forgets_nothing(folder: Path) -> None:
    clock = FakeClock(NOON)
    observer = counting(folder, clock, days=2)
    for _ in range(2):
        observer.end(ended())
        observer.flush()
        clock.advance(DAY_S)
    clock.now = NOON + 36_500 * DAY_S
    for each in (observer, counting(folder, clock, days=2)):  # a restart meanwhile, too
        each.end(ended())
        each.flush()
    assert [group.day for group in kept(folder)] == ["2026-11-29", "2026-11-30", day_of(clock.now)]
    clock.now = NOON + 2 * DAY_S
    observer.end(ended())
    observer.flush()
    assert [group.day for group in kept(folder)] == ["2026-11-30", "2026-12-01", "2126-11-05"]


def test_its_own_thread_writes_and_what_is_left_is_written_at_the_end(folder: Path) -> None:
    observer = UsageObserver(folder, 400, FakeClock(NOON))
    observer.end(ended())
    observer.end(ended())
    observer.close()
    assert kept(folder) == {Group(DAY, "one", "tiny"): Totals(2, 20, 8, 14)}


@pytest.mark.parametrize("calls", [0, 2])
def test_disk_that_hangs_holds_up_no_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, calls: int
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(module, "CLOSE_S", 0.05)
    for name in ("add", "close"):
        monkeypatch.setattr(UsageStore, name, lambda *_: answers.wait())
    observer = UsageObserver(folder, 400, FakeClock(NOON))
    for _ in range(calls):
        observer.end(ended())
    closing = threading.Thread(target=observer.close, daemon=True)
    closing.start()
    closing.join(10)
    has_ended = not closing.is_alive()
    answers.set()
    assert has_ended
    assert "does not answer" in caplog.text


def test_full_disk_is_told_once_and_nothing_is_lost(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    observer = counting(folder)
    observer.end(ended())
    assert observer.flush()
    base = observer._store._base
    assert base is not None
    (pages,) = base.execute("PRAGMA page_count").fetchone()
    keys = [f"{number:0200}" for number in range(100)]  # more than the page has room for
    for key in keys:
        observer.end(ended(key))
    reopened = observer._store._open

    def full() -> sqlite3.Connection:
        made = reopened()
        made.execute(f"PRAGMA max_page_count = {pages}")
        return made

    observer._store.close()
    observer._store._open = full  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO):
        assert [observer.flush(), observer.flush()] == [False, False]
        observer.end(ended())
        assert len(kept(folder)) == 1
        observer._store._open = reopened  # type: ignore[method-assign]
        assert observer.flush()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert "full" in caplog.records[0].message
    assert len(kept(folder)) == 101
    assert kept(folder)[Group(DAY, "one", "tiny")] == Totals(2, 20, 8, 14)


def test_waiting_sums_are_bounded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    observer = counting(folder)
    for key in ("a", "b", "c", "d", "a"):
        observer.end(ended(key))
    assert len(caplog.records) == 1
    observer.flush()
    assert {group.key_id: totals.requests for group, totals in kept(folder).items()} == {"a": 2, "b": 1}


def test_every_loss_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    folder.mkdir()
    observer = counting(folder)
    for _ in range(2):
        (folder / FILE).unlink(missing_ok=True)
        (folder / FILE).mkdir()
        for key in "abc":
            observer.end(ended(key))
            assert not observer.flush()
        (folder / FILE).rmdir()
        assert observer.flush()
    told = [record.message for record in caplog.records if "for want of room" in record.message]
    assert len(told) == 2


def test_file_that_is_no_database_is_told_and_quotas_begin_anew(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / FILE).write_bytes(b"no database, but long enough to be taken for one" * 40)
    observer = counting(folder)
    assert observer.tokens_today() == {}
    assert FILE in caplog.records[0].message
    observer.end(ended())
    assert not observer.flush()
    (folder / FILE).unlink()
    assert observer.flush()
    assert len(kept(folder)) == 1


def test_file_of_a_later_version_is_not_touched(folder: Path) -> None:
    with UsageStore(folder) as store:
        store.add({Group(DAY, "", ""): Totals(1)})
    with sqlite3.connect(folder / FILE) as base:
        base.execute("PRAGMA user_version = 2")
    base.close()
    with UsageStore(folder) as store, pytest.raises(UsageError, match="later version"):
        store.add({Group(DAY, "", ""): Totals(1)})


def test_file_that_was_moved_away_is_made_anew(folder: Path) -> None:
    observer = counting(folder)
    for _ in range(2):
        observer.end(ended())
        assert observer.flush()
        (folder / FILE).rename(folder / "old.sqlite")
    observer.end(ended())
    assert observer.flush()
    assert kept(folder)[Group(DAY, "one", "tiny")].requests == 1
