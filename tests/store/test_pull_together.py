"""Pulls beside other programs on the same disk: other servers, and Hugging Face's own cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bear_grpc.errors import HubAccessDenied, PullCancelled
from bear_grpc.store.hub import Hub
from bear_grpc.store.store import Store
from bear_grpc.types import PullProgress, PullStage
from tests.helpers.hub import StandInHub
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


class Watched(list[PullProgress]):
    """Progress that somebody waits for."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def append(self, progress: PullProgress) -> None:
        super().append(progress)
        if len(self) == 1:
            self.gate.reached.set()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models", hub_cache=tmp_path / "cache")


@pytest.fixture
def puller(stand_in: StandInHub, hub: Hub, store: Store) -> Puller:
    stand_in.add(REPO, FILE, DATA)
    return Puller(store, hub)


def cached(tmp_path: Path, data: bytes, *, as_symlink: bool = False) -> Path:
    file = tmp_path / "cache" / "models--owner--repo" / "blobs" / SHA
    file.parent.mkdir(parents=True)
    real = tmp_path / "elsewhere" if as_symlink else file
    real.write_bytes(data)
    if as_symlink:
        file.symlink_to(real)
    return file


def test_two_servers_fetch_a_model_once(puller, stand_in):
    gate = Gate(4 * SEGMENT)
    puller.limiter = gate.limiter
    first = Background(puller.pull)
    assert gate.reached.wait(WAIT_S)
    seen = Gate(0)
    other = Puller(Store(puller.store.blobs.folder), puller.hub, progress=Watched(seen))
    second = Background(other.pull)
    # The other one tells how far the first one is.
    assert seen.reached.wait(WAIT_S)
    assert 0 < other.progress[0].completed_bytes <= 4 * SEGMENT
    gate.opened.set()
    assert first.result() == second.result()
    assert other.progress[-1].completed_bytes == len(DATA)
    texts = [request.range for request in stand_in.asked("storage")]
    assert len(texts) == len(set(texts)) == 9
    check_blobs(puller.store)


def test_server_that_waits_takes_over_when_the_other_one_gives_up(puller):
    gate = Gate(4 * SEGMENT)
    puller.limiter = gate.limiter
    first = Background(puller.pull)
    assert gate.reached.wait(WAIT_S)
    seen = Gate(0)
    other = Puller(Store(puller.store.blobs.folder), puller.hub, progress=Watched(seen))
    second = Background(other.data)
    assert seen.reached.wait(WAIT_S)
    puller.stop.set()
    with pytest.raises(PullCancelled):
        first.result()
    assert second.result() == DATA


def test_server_that_waits_can_be_stopped(puller):
    lock = puller.store.blobs.lock(SHA)
    assert lock.acquire()
    seen = Gate(0)
    puller.progress = Watched(seen)
    work = Background(puller.pull)
    assert seen.reached.wait(WAIT_S)
    puller.stop.set()
    with pytest.raises(PullCancelled):
        work.result()
    lock.release()


def test_model_that_is_being_pulled_again_outlives_its_removal(puller, stand_in):
    """Its lock is held from before the blob is found until the manifest names it."""
    puller.pull()
    stand_in.add("other/pair", "m-Q8_0-00001-of-00002.gguf", DATA)
    stand_in.add("other/pair", "m-Q8_0-00002-of-00002.gguf", content(4 * SEGMENT, seed=3))
    gate = Gate(2 * SEGMENT)
    other = Puller(Store(puller.store.blobs.folder), puller.hub, limiter=gate.limiter)
    work = Background(lambda: other.pull("other/pair:Q8_0"))
    assert gate.reached.wait(WAIT_S)
    assert puller.store.remove(NAME) == 0
    assert puller.store.prune(dry_run=False) == []
    gate.opened.set()
    work.result()
    (manifest,) = puller.store.manifests()
    assert puller.store.is_whole(manifest)
    assert puller.store.path(manifest).read_bytes() == DATA


def test_file_of_the_cache_is_verified_and_linked(puller, stand_in, tmp_path):
    file = cached(tmp_path, DATA)
    manifest = puller.pull()
    assert stand_in.asked("storage") == []
    assert puller.store.path(manifest).samefile(file)
    assert PullStage.VERIFYING in {progress.stage for progress in puller.progress}
    assert puller.progress[-1].completed_bytes == len(DATA)
    assert puller.store.remove(NAME) == len(DATA)
    assert file.read_bytes() == DATA


def test_file_of_the_cache_may_be_a_link_itself(puller, stand_in, tmp_path):
    cached(tmp_path, DATA, as_symlink=True)
    assert puller.data() == DATA
    assert stand_in.asked("storage") == []


@pytest.mark.parametrize("wrong", [DATA[:-1], DATA[:-1] + bytes([DATA[-1] ^ 1])])
def test_wrong_file_of_the_cache_is_left_alone_and_the_model_fetched(puller, tmp_path, wrong):
    file = cached(tmp_path, wrong)
    assert puller.data() == DATA
    assert file.read_bytes() == wrong
    assert sorted(os.listdir(puller.store.blobs.under_way)) == []


def test_file_of_the_cache_that_goes_away_is_fetched(puller, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    file = cached(tmp_path, DATA)
    monkeypatch.setattr(os, "link", refuse)
    manifest = puller.pull()
    assert puller.store.path(manifest).is_symlink()
    file.unlink()
    assert not puller.store.is_whole(manifest)
    assert puller.data() == DATA
    assert not puller.store.path(manifest).is_symlink()


def test_token_is_not_needed_for_what_the_cache_has_but_for_the_listing(puller, stand_in, tmp_path):
    """A gated model that somebody has downloaded is not handed to everybody."""
    cached(tmp_path, DATA)
    stand_in.fail(REPO, gated=True)
    with pytest.raises(HubAccessDenied):
        puller.pull()
    assert not puller.store.blobs.has(SHA, len(DATA))
