"""Models on this machine that have come from a hub: what there is, where, and how to be rid of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from .blobs import Blobs
from .locks import held
from .manifests import Manifest, ManifestFile, Manifests
from .prune import Pruner

log = logging.getLogger(__name__)


class Store:
    """A folder of models; several servers may use it. Blocking calls, any thread. Raises OSError.

    A model is here when its manifest is: that is written last, and removed first.
    """

    def __init__(self, folder: Path, *, hub_cache: Path | None = None) -> None:
        """`hub_cache` is Hugging Face's cache folder, to link files from that are there already."""
        self.blobs = Blobs(folder, hub_cache=hub_cache)
        self._manifests = Manifests(folder / "manifests")
        # Held for a moment whenever manifests change, or when what none of them names is removed.
        self._lock = folder / "manifests" / ".lock"
        self._splits = folder / "split"

    def manifests(self) -> list[Manifest]:
        """The models that were pulled; files that are no manifest are told in the log."""
        return self._manifests.read()

    def find(self, name: str) -> Manifest | None:
        """The one of a model; None if it was not pulled."""
        return self._manifests.find(name)

    def path(self, manifest: Manifest) -> Path:
        """What llama.cpp opens: the blob, or the first part of a split model under its own name."""
        if not manifest.is_split:
            return self.blobs.path(manifest.files[0].sha256)
        folder = self._splits / manifest.split_key
        if not all(_is_linked(folder, file) for file in manifest.files):
            with held(self._lock):
                self._link_parts(manifest)
        return folder / Path(manifest.files[0].file).name

    def is_whole(self, manifest: Manifest) -> bool:
        """Whether all its files are here, with the right sizes."""
        return all(self.blobs.has(file.sha256, file.size_bytes) for file in manifest.files)

    def keep(self, manifest: Manifest) -> None:
        """Makes a model known; the locks of its blobs are held, so that nobody removes them before."""
        with held(self._lock):
            if manifest.is_split:
                self._link_parts(manifest)
            self._manifests.write(manifest)

    def remove(self, name: str) -> int:
        """Forgets a model and removes the files that no other one uses; bytes removed.

        Nothing if there is no such model. A file that is being pulled again at this moment stays.
        """
        with held(self._lock):
            manifest = self._manifests.find(name)
            self._manifests.remove(name)
            if manifest is None:
                return 0
            pruner = self._pruner(dry_run=False)
            for file in manifest.files:
                pruner.prune_blob(file.sha256)
            pruner.prune_splits()
            return sum(size for _, size in pruner.pruned)

    def prune(self, *, dry_run: bool) -> list[tuple[Path, int]]:
        """Removes what no model needs, or only tells it: paths relative to the folder, and bytes on the disk.

        That is files under way and those put aside, blobs that no manifest names, and temporary files; never
        what another download works on.
        """
        with held(self._lock):
            pruner = self._pruner(dry_run=dry_run)
            pruner.prune_all()
            return sorted(pruner.pruned)

    def _pruner(self, *, dry_run: bool) -> Pruner:
        return Pruner(self.blobs, self._splits, self._manifests, dry_run=dry_run)

    def _link_parts(self, manifest: Manifest) -> None:
        """Gives the parts of a model their names, where they have not got them."""
        folder = self._splits / manifest.split_key
        folder.mkdir(parents=True, exist_ok=True)
        for file in manifest.files:
            if not _is_linked(folder, file):
                new = folder / f"{file.sha256}.new"
                new.unlink(missing_ok=True)
                new.symlink_to(_target(file))
                new.replace(folder / Path(file.file).name)


def _target(file: ManifestFile) -> str:
    # Relative: the folder of models may be moved, or mounted elsewhere.
    return f"../../blobs/{file.sha256}"


def _is_linked(folder: Path, file: ManifestFile) -> bool:
    link = folder / Path(file.file).name
    return link.is_symlink() and os.readlink(link) == _target(file)
