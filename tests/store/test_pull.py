"""Whole pulls: a model comes, is verified, and is known; nothing wrong ever has a good name."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from bear_grpc.errors import ChecksumMismatch, DiskFull, HubUnreachable, PullCancelled
from bear_grpc.store.hub import Hub
from bear_grpc.store.pull import MARGIN_BYTES
from bear_grpc.store.store import Store
from bear_grpc.store.transfer import CONNECTIONS
from bear_grpc.types import PullStage
from tests.helpers.hub import ALWAYS, StandInHub
from tests.helpers.pulls import (
    FILE,
    NAME,
    REPO,
    SEGMENT,
    WAIT_S,
    Background,
    Gate,
    Puller,
    check_blobs,
    content,
    sha256_of,
)

DATA = content(8 * SEGMENT + 5)
SHA = sha256_of(DATA)
PARTS = [content(2 * SEGMENT + n, seed=n) for n in (10, 11, 12)]
SPLIT = [f"parts/big-Q8_0-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]


@pytest.fixture
def puller(stand_in: StandInHub, hub: Hub, tmp_path: Path) -> Puller:
    stand_in.add(REPO, FILE, DATA)
    for name, part in zip(SPLIT, PARTS, strict=True):
        stand_in.add(REPO, name, part)
    return Puller(Store(tmp_path / "models", hub_cache=tmp_path / "cache"), hub)


def another(puller: Puller) -> Puller:
    """Another server on the same folder."""
    return Puller(Store(puller.store.blobs.folder), puller.hub)


def cancelled_midway(puller: Puller, name: str = NAME) -> None:
    """Stops a pull after some three segments."""
    gate = Gate(3 * SEGMENT)
    puller.limiter = gate.limiter
    work = Background(lambda: puller.pull(name))
    assert gate.reached.wait(10)
    puller.stop.set()
    with pytest.raises(PullCancelled):
        work.result()
    puller.stop.clear()
    puller.limiter = Puller(puller.store, puller.hub).limiter


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def bytes_asked(stand_in: StandInHub) -> int:
    """Sum of all ranges that were asked for."""
    texts = [request.range for request in stand_in.asked("storage")]
    bounds = [text.removeprefix("bytes=").split("-") for text in texts if text is not None]
    return sum(int(last) - int(first) + 1 for first, last in bounds)


def test_pulled_model_is_whole_known_and_readable_only(puller, stand_in):
    manifest = puller.pull()
    path = puller.store.path(manifest)
    assert path.read_bytes() == DATA and path.name == SHA
    assert path.stat().st_mode & 0o777 == 0o444
    assert (manifest.name, manifest.repo_id, manifest.revision) == (NAME, REPO, "main")
    assert manifest.commit == stand_in.commit(REPO)
    assert [(file.file, file.sha256, file.size_bytes) for file in manifest.files] == [(FILE, SHA, len(DATA))]
    assert puller.store.manifests() == [manifest]
    assert puller.store.is_whole(manifest)
    assert files_in(puller.store.blobs.under_way) == []


def test_progress_begins_with_nothing_and_ends_with_all(puller):
    puller.pull()
    first, last = puller.progress[0], puller.progress[-1]
    assert (first.stage, first.completed_bytes) == (PullStage.DOWNLOADING, 0)
    assert (last.stage, last.completed_bytes) == (PullStage.VERIFYING, len(DATA))
    assert {progress.total_bytes for progress in puller.progress} == {len(DATA)}


def test_model_that_is_here_is_not_fetched_again(puller, stand_in):
    puller.pull()
    before = len(stand_in.asked("storage"))
    assert another(puller).data() == DATA
    assert len(stand_in.asked("storage")) == before


def test_same_file_under_another_name_is_stored_once(puller, stand_in):
    stand_in.add("other/copy", "same.gguf", DATA)
    puller.pull()
    before = len(stand_in.asked("storage"))
    assert puller.data("other/copy/same.gguf") == DATA
    assert len(stand_in.asked("storage")) == before
    assert len(puller.store.manifests()) == 2
    assert files_in(puller.store.blobs.whole) == [SHA]


def test_split_model_comes_whole_with_all_parts_beside_each_other(puller):
    manifest = puller.pull(f"{REPO}/{SPLIT[0]}")
    first = puller.store.path(manifest)
    assert [first.with_name(Path(name).name).read_bytes() for name in SPLIT] == PARTS
    assert puller.progress[-1].completed_bytes == sum(map(len, PARTS))
    check_blobs(puller.store)


def test_parts_with_the_same_content_are_one_file(puller, stand_in):
    for name in SPLIT:
        stand_in.add("o/same", name, PARTS[0])
    manifest = puller.pull(f"o/same/{SPLIT[0]}")
    assert len(manifest.files) == 3
    assert files_in(puller.store.blobs.whole) == [sha256_of(PARTS[0])]
    assert len(list(puller.store.path(manifest).parent.iterdir())) == 3


def test_cancelled_pull_tells_what_it_keeps_and_goes_on_from_there(puller, stand_in):
    cancelled_midway(puller)
    kept = puller.progress[-1].completed_bytes
    assert 0 < kept < len(DATA)
    assert files_in(puller.store.blobs.under_way) == [f"{SHA}.json", f"{SHA}.part"]
    assert puller.store.manifests() == []
    stand_in.requests.clear()
    puller.progress.clear()
    assert puller.data() == DATA
    assert puller.progress[0].completed_bytes == kept
    assert bytes_asked(stand_in) == len(DATA) - kept


def test_cancelled_split_model_keeps_its_whole_parts(puller, stand_in):
    cancelled_midway(puller, f"{REPO}/{SPLIT[0]}")
    assert len(files_in(puller.store.blobs.whole)) == 1
    kept = puller.progress[-1].completed_bytes
    stand_in.requests.clear()
    manifest = puller.pull(f"{REPO}/{SPLIT[0]}")
    assert bytes_asked(stand_in) == sum(map(len, PARTS)) - kept
    assert puller.store.is_whole(manifest)


def test_cancel_does_not_wait_for_a_hub_that_is_silent(puller, stand_in):
    sent, silent = threading.Semaphore(0), threading.Event()
    stand_in.fail(FILE, slow=silent, on_chunk=lambda offset: sent.release())
    # Far longer than this test waits: only the end of the connections can end the reads.
    with closing(Hub(endpoint=stand_in.url, timeout_s=10 * WAIT_S)) as hub:
        puller.hub = hub
        work = Background(puller.pull)
        for _ in range(CONNECTIONS):
            assert sent.acquire(timeout=WAIT_S)
        puller.stop.set()
        try:
            with pytest.raises(PullCancelled):
                work.result()
        finally:
            silent.set()


def test_hub_that_goes_away_leaves_what_came(puller, stand_in):
    stand_in.fail(FILE, cut=(1000, ALWAYS), ignore_range=True)
    with pytest.raises(HubUnreachable):
        puller.pull()
    assert puller.progress[-1].completed_bytes == 1000
    stand_in.heal()
    assert puller.data() == DATA


def test_wrong_bytes_never_get_a_good_name(puller, stand_in):
    stand_in.fail(FILE, corrupt=1)
    with pytest.raises(ChecksumMismatch) as caught:
        puller.pull()
    assert caught.value.metadata["expected_sha256"] == SHA
    assert files_in(puller.store.blobs.whole) == []
    assert files_in(puller.store.blobs.quarantined) == [f"{SHA}.1"]
    assert files_in(puller.store.blobs.under_way) == []
    assert puller.store.manifests() == []
    assert puller.data() == DATA


def test_wrong_bytes_of_an_earlier_run_are_fetched_again(puller, stand_in):
    stand_in.fail(FILE, corrupt=1)
    cancelled_midway(puller)
    kept = puller.progress[-1].completed_bytes
    stand_in.requests.clear()
    assert puller.data() == DATA
    assert files_in(puller.store.blobs.quarantined) == []
    # What was missing, and then the segments that the first run had received or begun.
    assert len(DATA) <= bytes_asked(stand_in) <= len(DATA) + 4 * SEGMENT
    assert bytes_asked(stand_in) > len(DATA) - kept


def test_bytes_that_changed_on_the_disk_are_fetched_again_and_no_others(puller, stand_in):
    cancelled_midway(puller)
    kept = puller.progress[-1].completed_bytes
    with puller.store.blobs.part(SHA).open("r+b") as part:
        part.write(b"\0" * 100)
    stand_in.requests.clear()
    assert puller.data() == DATA
    # Other threads may have kept more than was told at the moment of the cancel, and never less.
    assert SEGMENT < bytes_asked(stand_in) <= len(DATA) - kept + SEGMENT


def test_hub_that_sends_other_bytes_than_it_announces_is_refused(puller, stand_in):
    stand_in.fail(FILE, corrupt=ALWAYS)
    cancelled_midway(puller)
    with pytest.raises(ChecksumMismatch):
        puller.pull()
    assert files_in(puller.store.blobs.whole) == []


def test_disk_without_room_is_told_before_the_first_byte(puller, stand_in):
    free = len(DATA) + MARGIN_BYTES - 1
    puller.free = lambda folder: free
    with pytest.raises(DiskFull) as caught:
        puller.pull()
    assert caught.value.metadata == {
        "model": NAME,
        "needed_bytes": str(free + 1),
        "free_bytes": str(free),
    }
    assert stand_in.asked("storage") == []
    puller.free = lambda folder: free + 1
    assert puller.data() == DATA


def test_room_for_all_parts_is_asked_for_at_the_first(puller, stand_in):
    puller.free = lambda folder: len(PARTS[0]) + MARGIN_BYTES
    with pytest.raises(DiskFull):
        puller.pull(f"{REPO}/{SPLIT[0]}")
    assert stand_in.asked("storage") == []


def test_disk_that_others_fill_meanwhile_ends_it_and_what_came_is_kept(puller):
    gate = Gate(3 * SEGMENT)
    puller.limiter = gate.limiter
    hours = iter(range(10**9))
    puller.clock = lambda: 3600.0 * next(hours)
    puller.free = lambda folder: 0 if gate.reached.is_set() else 2**50
    with pytest.raises(DiskFull):
        puller.pull()
    kept = puller.progress[-1].completed_bytes
    assert 0 < kept < len(DATA)
    again = another(puller)
    assert again.data() == DATA
    assert again.progress[0].completed_bytes == kept


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_write_that_finds_the_disk_full_is_told_as_that(puller, monkeypatch, code):
    write, lock, written = os.pwritev, threading.Lock(), [0]

    def pwritev(handle, pieces, offset):
        with lock:
            if written[0] >= 3 * SEGMENT:
                raise OSError(code, os.strerror(code))
            written[0] += sum(map(len, pieces))
        return write(handle, pieces, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(DiskFull) as caught:
        puller.pull()
    kept = puller.progress[-1].completed_bytes
    assert kept == written[0]
    assert caught.value.metadata["needed_bytes"] == str(len(DATA) - kept + MARGIN_BYTES)
    monkeypatch.undo()
    assert puller.data() == DATA


def test_disk_that_fails_otherwise_is_not_told_as_full(puller, monkeypatch):
    def pwritev(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(OSError, match="Input/output"):
        puller.pull()


def test_write_that_takes_less_than_all_goes_on(puller, monkeypatch):
    write = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda handle, pieces, offset: write(handle, [bytes(pieces[0])[:10]], offset)
    )
    assert puller.data() == DATA


def test_blob_that_lost_its_end_is_replaced_and_kept_for_a_person(puller):
    manifest = puller.pull()
    blob = puller.store.path(manifest)
    blob.chmod(0o644)
    blob.write_bytes(DATA[:-1])
    assert not puller.store.is_whole(manifest)
    assert puller.data() == DATA
    assert (puller.store.blobs.quarantined / f"{SHA}.1").read_bytes() == DATA[:-1]
