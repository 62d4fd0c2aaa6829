"""One model from the hub into the store: what is missing is fetched, verified, and then made known."""

from __future__ import annotations

import errno
import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ChecksumMismatch, DiskFull, PullCancelled
from ..types import PullProgress, PullStage
from .download import Download
from .hashing import hash_file
from .listing import HubFile, Resolved
from .manifests import Manifest, ManifestFile
from .partial import Partial
from .progress import Meter
from .rate import RateLimiter as RateLimiter
from .state import read_state
from .store import Store
from .transfer import Transfer, backoff_s

if TYPE_CHECKING:
    from .hub import Hub

log = logging.getLogger(__name__)

MARGIN_BYTES = 64 * 2**20
CHECK_S = 1.0
WAIT_S = 0.2
_FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: Path) -> int:
    """What may still be written to a folder's disk."""
    return shutil.disk_usage(folder).free


class Pull:
    """The download of one model. `run` once, in a thread of its own; `on_progress` is called from there.

    Several servers may pull the same model into one folder: one downloads, the others wait for it.
    """

    def __init__(
        self,
        store: Store,
        hub: Hub,
        resolved: Resolved,
        *,
        limiter: RateLimiter,
        stop: threading.Event,
        on_progress: Callable[[PullProgress], None],
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[int], float] = backoff_s,
        free: Callable[[Path], int] = free_bytes,
    ) -> None:
        """The last three are the machine's unless a test says otherwise; `pause` is as for `Transfer`."""
        self._store, self._blobs = store, store.blobs
        self._hub, self._resolved = hub, resolved
        self._limiter, self._stop = limiter, stop
        self._clock, self._pause, self._free = clock, pause, free
        # Two parts with the same content are one file here.
        self._files = list({file.sha256: file for file in resolved.files}.values())
        self._meter = Meter(sum(file.size_bytes for file in self._files), on_progress, clock)
        self._placed_bytes = 0
        self._checked_at = clock()

    def run(self) -> Manifest:
        """Blocks until the model is here, whole and verified; what has come is kept in any case.

        Raises PullCancelled soon after `stop` is set, DiskFull, ChecksumMismatch, the errors of `Hub.stream`,
        and OSError for a disk that fails otherwise.
        """
        resolved = self._resolved
        manifest = Manifest(
            resolved.name,
            resolved.repo_id,
            resolved.revision,
            resolved.commit,
            [ManifestFile(file.file, file.sha256, file.size_bytes) for file in resolved.files],
        )
        with self._disk_full_as_error(), ExitStack() as locks:
            self._meter.tell(PullStage.DOWNLOADING, self._present_bytes(self._files))
            self._lock_all(locks)
            missing = [file for file in self._files if not self._is_here(file)]
            while missing:
                file = missing.pop(0)
                self._fetch(file, missing)
                self._placed_bytes += file.size_bytes
            self._store.keep(manifest)
        self._meter.tell(PullStage.VERIFYING, self._placed_bytes, at_once=True)
        return manifest

    def _lock_all(self, locks: ExitStack) -> None:
        """Takes the locks of all files, in the order that everybody takes them."""
        for sha256 in sorted(file.sha256 for file in self._files):
            lock = self._blobs.lock(sha256)
            while not lock.acquire():
                self._meter.tell(PullStage.DOWNLOADING, self._present_bytes(self._files))
                self._stop.wait(WAIT_S)
                self._check_stop()
            locks.callback(lock.release)

    def _present_bytes(self, files: Iterable[HubFile]) -> int:
        """What is here of files, as everybody can see it."""
        return sum(self._present_of(file) for file in files)

    def _present_of(self, file: HubFile) -> int:
        if self._blobs.has(file.sha256, file.size_bytes):
            return file.size_bytes
        state = read_state(self._blobs, file.sha256)
        return 0 if state is None else min(state.present_bytes, file.size_bytes)

    def _is_here(self, file: HubFile) -> bool:
        """Whether a file need not be downloaded; then it is in its place."""
        here = self._blobs.has(file.sha256, file.size_bytes)
        if here:
            self._blobs.clear(file.sha256)
        else:
            self._blobs.put_aside_damaged(file.sha256)
            here = self._adopt_cached(file)
        if here:
            self._placed_bytes += file.size_bytes
            self._meter.restart()
        return here

    def _adopt_cached(self, file: HubFile) -> bool:
        """Uses the file of Hugging Face's cache, if it is what its name says."""
        link = self._blobs.link_cached(self._resolved.repo_id, file.sha256, file.size_bytes)
        if link is None:
            return False

        def available(position: int) -> int:
            self._check_stop()
            self._meter.tell(PullStage.VERIFYING, self._placed_bytes + position)
            return file.size_bytes

        with link.open("rb", buffering=0) as cached:
            digest = hash_file(cached.fileno(), file.size_bytes, available)
        if digest != file.sha256:
            log.warning("%s in Hugging Face's cache has SHA-256 %s; it is not used", file.sha256, digest)
            link.unlink()
            return False
        self._blobs.place_link(file.sha256)
        return True

    def _fetch(self, file: HubFile, later: Sequence[HubFile]) -> None:
        """Downloads a file and verifies it; `later` ones need room on the disk, too."""
        later_present = self._present_bytes(later)
        later_missing = sum(each.size_bytes for each in later) - later_present
        partial = Partial(self._blobs, self._resolved.repo_id, file)

        def missing_bytes() -> int:
            return partial.size_bytes - partial.present_bytes + later_missing

        def tick(download: Download) -> None:
            self._check_stop()
            now = self._clock()
            if now - self._checked_at >= CHECK_S:
                self._checked_at = now
                partial.save()
                # The other half of the margin is for what file systems need besides the bytes.
                self._check_disk(missing_bytes(), MARGIN_BYTES // 2)
            stage, completed = download.progress
            self._meter.tell(stage, self._placed_bytes + later_present + completed)

        try:
            self._check_disk(missing_bytes(), MARGIN_BYTES)
            self._complete(file, partial, tick)
        except BaseException:
            self._meter.tell(
                PullStage.DOWNLOADING,
                self._placed_bytes + later_present + partial.present_bytes,
                at_once=True,
            )
            raise
        finally:
            partial.close()

    def _complete(self, file: HubFile, partial: Partial, tick: Callable[[Download], None]) -> None:
        """Fetches what is missing, and what turns out wrong once more, until the file is in its place."""
        remedies = [partial.drop_changed, partial.drop_kept]
        while True:
            transfer = Transfer(self._hub, self._resolved, file, partial, self._limiter, self._pause)
            download = Download(transfer, partial)
            digest = download.run(functools.partial(tick, download))
            if digest == file.sha256:
                partial.sync()
                return self._blobs.place(self._blobs.part(file.sha256), file.sha256)
            log.warning("%s has SHA-256 %s, not %s", file.file, digest, file.sha256)
            while remedies and not partial.missing():
                remedies.pop(0)(self._check_stop)
            if not partial.missing():
                self._blobs.quarantine(self._blobs.part(file.sha256), file.sha256)
                raise ChecksumMismatch(file.file, file.sha256, digest)

    def _check_disk(self, missing_bytes: int, margin_bytes: int) -> None:
        free = self._free(self._blobs.folder)
        if free < missing_bytes + margin_bytes:
            raise DiskFull(self._resolved.name, missing_bytes + margin_bytes, free)

    @contextmanager
    def _disk_full_as_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            if exc.errno not in _FULL:
                raise
            present = self._present_bytes(self._files)
            needed = sum(file.size_bytes for file in self._files) - present + MARGIN_BYTES
            raise DiskFull(self._resolved.name, needed, self._free(self._blobs.folder)) from exc

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise PullCancelled(self._resolved.name)
