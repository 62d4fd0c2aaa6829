"""What no model needs any more."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .blobs import Blobs
from .files import TEMPORARY_SUFFIX
from .listing import is_sha256
from .manifests import Manifests

log = logging.getLogger(__name__)

BLOCK_BYTES = 512  # the unit of st_blocks


class Pruner:
    """Removes what manifests do not need, or with `dry_run` only notes it; they must not change meanwhile."""

    def __init__(
        self,
        blobs: Blobs,
        splits: Path,
        manifests: Manifests,
        *,
        dry_run: bool,
    ) -> None:
        self.pruned: list[tuple[Path, int]] = []
        self._blobs = blobs
        self._splits = splits
        self._manifests_folder = manifests.folder
        self._needed = manifests.checksums()
        self._needed_splits = {manifest.split_key for manifest in manifests.read() if manifest.is_split}
        self._dry_run = dry_run

    def prune_all(self) -> None:
        """Everything that is not needed."""
        for path in _entries(self._blobs.whole):
            self.prune_blob(path.name)
        for sha256 in sorted({path.name.partition(".")[0] for path in _entries(self._blobs.under_way)}):
            self.prune_under_way(sha256)
        for path in _entries(self._blobs.quarantined):
            if is_sha256(path.name.partition(".")[0]):
                self._remove(path)
        for path in _entries(self._manifests_folder):
            if path.name.endswith(TEMPORARY_SUFFIX):
                self._remove(path)
        self.prune_splits()

    def prune_blob(self, sha256: str) -> None:
        """A whole file, unless a manifest names it or a download is about to have it named."""
        if not is_sha256(sha256) or sha256 in self._needed:
            return
        with self._locked(sha256) as is_mine:
            path = self._blobs.path(sha256)
            if is_mine and (path.exists() or path.is_symlink()):
                self._remove(path)

    def prune_under_way(self, sha256: str) -> None:
        """What a download has left, unless it still runs."""
        if not is_sha256(sha256):
            return
        with self._locked(sha256) as is_mine:
            for path in self._blobs.leftovers(sha256) if is_mine else ():
                self._remove(path)

    def prune_splits(self) -> None:
        """Links to the parts of models that are gone."""
        for folder in _entries(self._splits):
            if not is_sha256(folder.name) or folder.name in self._needed_splits:
                continue
            for link in _entries(folder):
                if link.is_symlink():
                    self._remove(link)
            if not self._dry_run and not _entries(folder):
                folder.rmdir()

    @contextmanager
    def _locked(self, sha256: str) -> Iterator[bool]:
        lock = self._blobs.lock(sha256)
        is_mine = lock.acquire()
        try:
            yield is_mine
        finally:
            lock.release()

    def _remove(self, path: Path) -> None:
        stat = path.lstat()
        size = 0 if path.is_symlink() else stat.st_size
        if path.suffix == ".part":  # as long as it will be; it takes only what has come
            size = min(size, stat.st_blocks * BLOCK_BYTES)
        if not self._dry_run:
            path.unlink()
            log.info("removed %s", path)
        self.pruned.append((path.relative_to(self._blobs.folder), size))


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
