"""Where files lie by their SHA-256: whole ones, those under way, and those that turned out wrong.

Whoever changes a blob or what belongs to it holds its lock.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from .files import sync_folder
from .locks import FileLock

log = logging.getLogger(__name__)

READ_ONLY = 0o444
# A hub that goes on sending wrong bytes must not fill the disk.
MAX_QUARANTINED = 2


class Blobs:
    """The folders of one store. Blocking calls, any thread. Raises OSError."""

    def __init__(self, folder: Path, *, hub_cache: Path | None = None) -> None:
        """`hub_cache` is Hugging Face's cache folder, whose files are used where they are the same."""
        self.folder = folder
        self.whole = folder / "blobs"
        self.under_way = folder / "partial"
        self.quarantined = folder / "quarantine"
        self._hub_cache = hub_cache

    def path(self, sha256: str) -> Path:
        """Where the whole file is, or would be."""
        return self.whole / sha256

    def part(self, sha256: str) -> Path:
        """Where its bytes are while they come."""
        return self.under_way / f"{sha256}.part"

    def state(self, sha256: str) -> Path:
        """Where it says which of them are there."""
        return self.under_way / f"{sha256}.json"

    def lock(self, sha256: str) -> FileLock:
        """Who holds it may change the blob, its parts and its state."""
        return FileLock(self.under_way / f"{sha256}.lock")

    def has(self, sha256: str, size_bytes: int) -> bool:
        """Whether the whole file is there: it was verified before it came to its place."""
        try:
            return self.path(sha256).stat().st_size == size_bytes
        except FileNotFoundError:
            return False

    def place(self, source: Path, sha256: str) -> None:
        """Moves a file that has been verified and is on the disk to its place."""
        self.whole.mkdir(parents=True, exist_ok=True)
        # Before it has its name, so that nobody ever finds a blob that can be written to.
        source.chmod(READ_ONLY)
        source.replace(self.path(sha256))
        sync_folder(self.whole)
        self.clear(sha256)

    def quarantine(self, source: Path, sha256: str) -> Path:
        """Puts a wrong file aside for a person to look at, in place of the oldest where there are enough."""
        self.quarantined.mkdir(parents=True, exist_ok=True)
        places = [self.quarantined / f"{sha256}.{number}" for number in range(1, MAX_QUARANTINED + 1)]
        free = [place for place in places if not place.exists()]
        target = free[0] if free else min(places, key=lambda place: place.stat().st_mtime_ns)
        source.replace(target)
        if source == self.part(sha256):
            self.clear(sha256)
        log.error("%s is not what its name says; it is kept as %s", source, target)
        return target

    def put_aside_damaged(self, sha256: str) -> None:
        """Takes a blob that does not have its size any more, or leads nowhere, from its place."""
        path = self.path(sha256)
        if path.is_symlink():  # to a file of Hugging Face's cache
            path.unlink()
        elif path.exists():
            self.quarantine(path, sha256)

    def clear(self, sha256: str) -> None:
        """Removes what is left of a file under way."""
        for path in self.leftovers(sha256):
            path.unlink(missing_ok=True)

    def leftovers(self, sha256: str) -> list[Path]:
        """What is under way of a file, its lock aside."""
        names = (self.part(sha256), self.state(sha256), self.new_state(sha256), self.link(sha256))
        return [path for path in names if path.is_symlink() or path.exists()]

    def new_state(self, sha256: str) -> Path:
        """The state while it is being written."""
        return self.under_way / f"{sha256}.json.new"

    def link(self, sha256: str) -> Path:
        """A link to a file of Hugging Face's cache, until it is verified."""
        return self.under_way / f"{sha256}.link"

    def link_cached(self, repo_id: str, sha256: str, size_bytes: int) -> Path | None:
        """Links what Hugging Face's cache has under this checksum, unverified; None: nothing."""
        if self._hub_cache is None:
            return None
        cached = self._hub_cache / f"models--{repo_id.replace('/', '--')}" / "blobs" / sha256
        try:
            cached = cached.resolve(strict=True)
            if not cached.is_file() or cached.stat().st_size != size_bytes:
                return None
        except OSError:
            return None
        link = self.link(sha256)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            os.link(cached, link)
        except OSError:  # another file system, or a file of somebody else
            link.symlink_to(cached)
        return link

    def place_link(self, sha256: str) -> None:
        """Moves a link to its place; what it leads to has been verified. Its mode is its owner's matter."""
        self.whole.mkdir(parents=True, exist_ok=True)
        self.link(sha256).replace(self.path(sha256))
        sync_folder(self.whole)
        self.clear(sha256)
