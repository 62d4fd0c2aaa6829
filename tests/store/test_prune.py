"""What removing and pruning take, and what they leave."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bear_grpc.store.listing import HubFile
from bear_grpc.store.locks import held
from bear_grpc.store.manifests import Manifest, ManifestFile
from bear_grpc.store.partial import Partial
from bear_grpc.store.store import Store
from tests.helpers.pulls import REPO, SEGMENT, Background, content, sha256_of

ONE, TWO, THREE = (content(1000 + n, seed=n) for n in range(3))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.blobs.under_way.mkdir(parents=True)
    return store


def put(store: Store, data: bytes) -> str:
    sha256 = sha256_of(data)
    store.blobs.part(sha256).write_bytes(data)
    store.blobs.place(store.blobs.part(sha256), sha256)
    return sha256


def keep(store: Store, name: str, *contents: bytes) -> Manifest:
    files = [ManifestFile(f"{n}.gguf", put(store, data), len(data)) for n, data in enumerate(contents)]
    manifest = Manifest(name, REPO, "main", "c" * 40, files)
    store.keep(manifest)
    return manifest


def every_file(store: Store) -> set[str]:
    """Files and links, locks aside."""
    return {
        path.relative_to(store.blobs.folder).as_posix()
        for path in store.blobs.folder.rglob("*")
        if not path.is_dir() and not path.name.endswith(".lock")
    }


def test_removed_model_is_gone_with_its_bytes(store):
    keep(store, "m", ONE)
    assert store.remove("m") == len(ONE)
    assert store.manifests() == []
    assert every_file(store) == set()


def test_removing_leaves_what_another_model_uses(store):
    keep(store, "m", ONE, TWO)
    other = keep(store, "n", TWO, THREE)
    assert store.remove("m") == len(ONE)
    assert store.manifests() == [other] and store.is_whole(other)
    assert store.path(other).read_bytes() == TWO
    assert store.remove("n") == len(TWO) + len(THREE)
    assert every_file(store) == set()


def test_removing_what_is_not_here_does_nothing(store):
    keep(store, "m", ONE)
    before = every_file(store)
    assert store.remove("other") == 0
    assert every_file(store) == before


def test_prune_of_a_tidy_store_takes_nothing(store):
    keep(store, "m", ONE)
    keep(store, "n", TWO, THREE)
    before = every_file(store)
    assert store.prune(dry_run=False) == []
    assert every_file(store) == before


def test_prune_of_no_folder_takes_nothing(tmp_path):
    assert Store(tmp_path / "none").prune(dry_run=False) == []


def clutter(store: Store) -> set[str]:
    """One of everything that nobody needs, and its names."""
    unnamed = put(store, ONE)
    wrong = sha256_of(TWO)
    store.blobs.part(wrong).write_bytes(b"not two")
    store.blobs.quarantine(store.blobs.part(wrong), wrong)
    under_way = sha256_of(THREE)
    partial = Partial(store.blobs, REPO, HubFile("x.gguf", under_way, 4 * SEGMENT))
    partial.append(0, [content(SEGMENT)])
    partial.close()
    store.blobs.new_state(under_way).write_bytes(b"{")
    store.blobs.link(under_way).symlink_to("nowhere")
    (store.blobs.under_way / f"{'a' * 64}.lock").touch()
    split = store.blobs.folder / "split" / ("b" * 64)
    split.mkdir(parents=True)
    (split / "1.gguf").symlink_to("../../blobs/x")
    (store.blobs.folder / "manifests").mkdir(exist_ok=True)
    (store.blobs.folder / "manifests" / "tmp123.partial").write_bytes(b"{")
    return {
        f"blobs/{unnamed}",
        f"quarantine/{wrong}.1",
        *(f"partial/{under_way}{ending}" for ending in (".part", ".json", ".json.new", ".link")),
        f"split/{'b' * 64}/1.gguf",
        "manifests/tmp123.partial",
    }


def test_prune_takes_what_nobody_needs_and_tells_the_bytes(store):
    manifest = keep(store, "m", content(500, seed=9))
    names = clutter(store)
    pruned = {path.as_posix(): size for path, size in store.prune(dry_run=False)}
    assert set(pruned) == names
    assert pruned[f"blobs/{sha256_of(ONE)}"] == len(ONE)
    assert pruned[f"quarantine/{sha256_of(TWO)}.1"] == len(b"not two")
    # The file is as long as it will be; the disk has what came.
    assert pruned[f"partial/{sha256_of(THREE)}.part"] < 2 * SEGMENT
    assert store.is_whole(manifest)
    assert every_file(store) == {
        f"blobs/{manifest.files[0].sha256}",
        "manifests/m.json",
    }
    assert list(store.blobs.under_way.iterdir()) == []
    assert not (store.blobs.folder / "split" / ("b" * 64)).exists()


def test_dry_run_tells_the_same_and_takes_nothing(store):
    clutter(store)
    before = every_file(store)
    told = store.prune(dry_run=True)
    assert every_file(store) == before
    assert store.prune(dry_run=False) == told


def test_prune_leaves_what_a_download_works_on(store):
    names = clutter(store)
    locks = [store.blobs.lock(sha256_of(data)) for data in (ONE, THREE)]
    assert all(lock.acquire() for lock in locks)
    pruned = {path.as_posix() for path, _ in store.prune(dry_run=False)}
    held = {name for name in names if sha256_of(ONE) in name or sha256_of(THREE) in name}
    assert pruned == names - held
    assert held <= every_file(store)
    for lock in locks:
        lock.release()


def test_prune_leaves_files_that_are_not_ours(store):
    for folder in ("blobs", "partial", "quarantine", "split"):
        (store.blobs.folder / folder).mkdir(exist_ok=True)
        (store.blobs.folder / folder / "notes.txt").write_text("of a person")
    before = every_file(store)
    assert store.prune(dry_run=False) == []
    assert every_file(store) == before


def test_prune_leaves_what_a_manifest_of_another_version_names(store, caplog):
    manifest = keep(store, "m", ONE)
    file = store.blobs.folder / "manifests" / "m.json"
    file.write_bytes(file.read_bytes().replace(b'"name"', b'"title"'))
    assert store.manifests() == []
    assert store.prune(dry_run=False) == []
    assert store.is_whole(manifest)


@pytest.mark.parametrize("call", ["remove", "prune", "keep"])
def test_changes_of_what_is_known_wait_for_each_other(store, call):
    manifest = keep(store, "m", ONE)
    done = threading.Event()

    def change() -> None:
        match call:
            case "remove":
                store.remove("m")
            case "prune":
                store.prune(dry_run=False)
            case "keep":
                store.keep(manifest)
        done.set()

    with held(store.blobs.folder / "manifests" / ".lock"):
        work = Background(change)
        assert not done.wait(0.05)
    work.result()
