"""Where whole files lie, how they come there, and who may touch them."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from bear_grpc.store.blobs import MAX_QUARANTINED, Blobs
from bear_grpc.store.files import TEMPORARY_SUFFIX, write_whole
from bear_grpc.store.locks import FileLock, held
from bear_grpc.store.manifests import Manifest, ManifestFile, Manifests
from bear_grpc.store.store import Store
from tests.helpers.pulls import Background, content, sha256_of

DATA = content(1000)
SHA = sha256_of(DATA)


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    blobs = Blobs(tmp_path / "models", hub_cache=tmp_path / "cache")
    blobs.under_way.mkdir(parents=True)
    return blobs


def manifest(name: str, *shas: str) -> Manifest:
    files = [ManifestFile(f"dir/m-{n}.gguf", sha, len(DATA)) for n, sha in enumerate(shas)]
    return Manifest(name, "owner/repo", "main", "c" * 40, files)


def cache(blobs: Blobs, data: bytes) -> Path:
    file = blobs.folder.parent / "cache" / "models--owner--repo" / "blobs" / SHA
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    return file


def test_placed_file_is_whole_read_only_and_leaves_nothing_under_way(blobs):
    blobs.part(SHA).write_bytes(DATA)
    blobs.state(SHA).write_bytes(b"{}")
    assert not blobs.has(SHA, len(DATA))
    blobs.place(blobs.part(SHA), SHA)
    assert blobs.path(SHA).read_bytes() == DATA
    assert blobs.path(SHA).stat().st_mode & 0o777 == 0o444
    assert list(blobs.under_way.iterdir()) == []
    assert blobs.has(SHA, len(DATA))


def test_blob_of_another_size_is_not_there(blobs):
    blobs.part(SHA).write_bytes(DATA)
    blobs.place(blobs.part(SHA), SHA)
    assert not blobs.has(SHA, len(DATA) + 1)


def test_quarantine_keeps_few_and_the_latest(blobs):
    for number in range(MAX_QUARANTINED + 2):
        blobs.part(SHA).write_bytes(b"wrong %d" % number)
        os.utime(blobs.part(SHA), ns=(number, number))
        blobs.quarantine(blobs.part(SHA), SHA)
    kept = {path.read_bytes() for path in blobs.quarantined.iterdir()}
    assert kept == {b"wrong 2", b"wrong 3"}
    assert not blobs.path(SHA).exists()


def test_file_of_the_cache_is_linked_not_copied(blobs):
    cached = cache(blobs, DATA)
    assert blobs.link_cached("owner/repo", SHA, len(DATA)) == blobs.link(SHA)
    assert not blobs.path(SHA).exists()  # not yet verified
    blobs.place_link(SHA)
    assert blobs.path(SHA).samefile(cached)
    assert not blobs.path(SHA).is_symlink()


def test_file_of_a_cache_elsewhere_is_linked_by_its_path(blobs, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    cached = cache(blobs, DATA)
    blobs.link_cached("owner/repo", SHA, len(DATA))
    blobs.place_link(SHA)
    assert blobs.path(SHA).is_symlink() and blobs.path(SHA).samefile(cached)
    cached.unlink()
    assert not blobs.has(SHA, len(DATA))
    blobs.put_aside_damaged(SHA)
    assert not blobs.path(SHA).is_symlink()


def test_file_of_the_cache_with_another_size_is_left_alone(blobs):
    cache(blobs, DATA[:-1])
    assert blobs.link_cached("owner/repo", SHA, len(DATA)) is None
    assert list(blobs.under_way.iterdir()) == []


def test_lock_excludes_others_and_leaves_no_file(tmp_path):
    first, second = FileLock(tmp_path / "x.lock"), FileLock(tmp_path / "x.lock")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert not (tmp_path / "x.lock").exists()
    assert second.acquire()
    second.release()


def test_lock_left_by_a_dead_process_is_taken(tmp_path):
    (tmp_path / "x.lock").touch()
    lock = FileLock(tmp_path / "x.lock")
    assert lock.acquire()
    lock.release()


def test_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The last holder removes the file after it is opened here, and the next one makes another."""
    path = tmp_path / "x.lock"
    flock, other = fcntl.flock, FileLock(path)

    def late(handle: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        assert other.acquire()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert not FileLock(path).acquire()
    other.release()


def test_lock_has_one_holder_though_its_file_comes_and_goes(tmp_path):
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        for _ in range(50):
            lock = FileLock(tmp_path / "x.lock")
            while not lock.acquire():
                pass
            with guard:
                inside += 1
                most = max(most, inside)
            with guard:
                inside, done = inside - 1, done + 1
            lock.release()

    workers = [Background(work) for _ in range(4)]
    for worker in workers:
        worker.result()
    assert (most, done) == (1, 200)


def test_waiting_lock_lets_one_in_after_the_other(tmp_path):
    entered = threading.Event()

    def enter() -> None:
        with held(tmp_path / "y.lock"):
            entered.set()

    with held(tmp_path / "y.lock"):
        other = Background(enter)
        assert not entered.wait(0.05)
    other.result()
    assert entered.is_set()


def test_small_file_stays_as_it_was_when_writing_fails(tmp_path):
    file = tmp_path / "small.json"
    write_whole(file, b"old")
    with pytest.raises(TypeError):
        write_whole(file, "no bytes")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(TEMPORARY_SUFFIX)]


def test_manifests_are_read_as_written_and_found_by_name(tmp_path):
    manifests = Manifests(tmp_path)
    names = ["o/r:Q4_K_M", "o/r/a/b.gguf@v1", "o/r/" + "ü/" * 200 + "x.gguf", "o/r/" + "ü/" * 200 + "y.gguf"]
    for name in names:
        manifests.write(manifest(name, SHA))
    assert sorted(each.name for each in manifests.read()) == sorted(names)
    assert all(manifests.find(name) == manifest(name, SHA) for name in names)
    manifests.remove(names[3])
    assert manifests.find(names[3]) is None and manifests.find(names[2]) is not None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'{"name": "n", "repo_id": "o/r", "revision": "main", "commit": "c", "files": []}',
        b'{"name": "n", "repo_id": "o/r", "revision": "main", "commit": "c", "files": '
        b'[{"file": "a.gguf", "sha256": "../../etc/passwd", "size_bytes": 1}]}',
    ],
)
def test_file_that_is_no_manifest_is_told_and_left_out(tmp_path, caplog, text):
    manifests = Manifests(tmp_path)
    manifests.write(manifest("good", SHA))
    (tmp_path / "bad.json").write_bytes(text)
    assert [each.name for each in manifests.read()] == ["good"]
    assert "bad.json is left out" in caplog.text


def test_parts_of_a_split_model_lie_beside_each_other_under_their_names(tmp_path):
    store = Store(tmp_path / "models")
    split = manifest("split", SHA, "1" * 64)
    store.keep(split)
    path = store.path(split)
    assert [link.name for link in sorted(path.parent.iterdir())] == ["m-0.gguf", "m-1.gguf"]
    store.blobs.part(SHA).parent.mkdir()
    store.blobs.part(SHA).write_bytes(DATA)
    store.blobs.place(store.blobs.part(SHA), SHA)
    assert path.read_bytes() == DATA
    (tmp_path / "models").rename(tmp_path / "moved")
    assert Store(tmp_path / "moved").path(split).read_bytes() == DATA


def test_link_that_is_gone_or_leads_elsewhere_is_made_again(tmp_path):
    store = Store(tmp_path)
    split = manifest("split", SHA, "1" * 64)
    store.keep(split)
    first = store.path(split)
    first.unlink()
    first.with_name("m-1.gguf").unlink()
    first.symlink_to("elsewhere")
    store.path(split)
    assert [os.readlink(first.with_name(name)) for name in ("m-0.gguf", "m-1.gguf")] == [
        f"../../blobs/{SHA}",
        f"../../blobs/{'1' * 64}",
    ]


def test_models_that_share_their_first_part_only_do_not_share_links(tmp_path):
    store = Store(tmp_path)
    one, two = manifest("one", SHA, "1" * 64), manifest("two", SHA, "2" * 64)
    store.keep(one)
    store.keep(two)
    assert os.readlink(store.path(one).with_name("m-1.gguf")) == f"../../blobs/{'1' * 64}"
    assert os.readlink(store.path(two).with_name("m-1.gguf")) == f"../../blobs/{'2' * 64}"
