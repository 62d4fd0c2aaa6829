"""Downloads under way: one for each model, however many ask for it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import (
    BackendError,
    BearError,
    ChecksumMismatch,
    HubUnreachable,
    InvalidField,
    ModelFileNotFound,
    ModelInUse,
    ModelNotFound,
    PullCancelled,
    QueueFull,
)
from ..store.listing import Resolved
from ..store.manifests import Manifest
from ..store.pull import Pull, RateLimiter
from ..store.reference import Reference, parse_reference
from ..store.store import Store
from ..types import HubSource, ModelFile, PullProgress, PullStage
from .download import Download
from .entry import ModelEntry
from .remote import look_at
from .shelf import Shelf

if TYPE_CHECKING:
    from ..store.hub import Hub

log = logging.getLogger(__name__)

AutoPull = Literal["catalog", "any", "never"]
# Under way and waiting together; and how many look at headers on the hub at a time.
MAX_DOWNLOADS, MAX_LOOKS = 64, 4


class PullManager:
    """Starts, joins and stops downloads. Event loop only; the bytes run in threads of its own."""

    def __init__(
        self,
        shelf: Shelf,
        store: Store,
        hub: Callable[[], Hub],
        *,
        auto_pull: AutoPull = "catalog",
        max_pulls: int = 2,
        bytes_per_s: float = 0.0,
    ) -> None:
        """`hub` opens it, in a thread, when it is needed first; it takes memory and a tenth of a second.

        `bytes_per_s` is of all downloads together, 0 without a limit.
        """
        self._shelf = shelf
        self._store = store
        self._open_hub = hub
        self._hub: Hub | None = None
        self._replaced: list[Hub] = []
        self._hub_lock = threading.Lock()
        self._auto_pull = auto_pull
        self._limiter = RateLimiter(bytes_per_s)
        self._turn = asyncio.Semaphore(max_pulls)
        self._threads = ThreadPoolExecutor(max_pulls, thread_name_prefix="pull")
        # Of its own: others must not wait for a hub that is slow.
        self._looks = ThreadPoolExecutor(MAX_LOOKS, thread_name_prefix="hub")
        self._downloads: dict[str, Download] = {}
        self._closing = False

    def set_auto_pull(self, auto_pull: AutoPull) -> None:
        """What requests may download by themselves, from the next one on."""
        self._auto_pull = auto_pull

    def set_rate(self, bytes_per_s: float) -> None:
        """Of all downloads together, from the next chunk of each on; 0 without a limit."""
        self._limiter.set_rate(bytes_per_s)

    def set_hub(self, hub: Callable[[], Hub]) -> None:
        """Another hub, or the same with another token, from the next question on; what is under way ends
        where it began."""
        with self._hub_lock:
            self._open_hub = hub
            if self._hub is not None:
                self._replaced.append(self._hub)
                self._hub = None

    async def open(self) -> None:
        """Puts what has been downloaded earlier onto the shelf."""
        for manifest in await asyncio.to_thread(self._store.manifests):
            try:
                await self._adopt(manifest)
            except BearError as exc:
                log.warning("%s, downloaded earlier, is left out: %s", manifest.name, exc)

    def begin(self, name: str) -> Download:
        """Starts the download of a model by its name or as a reference, or joins it.

        Raises ModelNotFound, InvalidField, QueueFull.
        """
        entry = self._shelf.find(name)
        if entry is not None and entry.source is None:
            raise InvalidField("name", f"{name!r} is a file of this server: there is nothing to download")
        reference = self.reference_of(name)
        return self._begin(reference.name if entry is None else entry.name, reference)

    async def ensure(self, name: str) -> None:
        """Downloads what a request needs, if the configuration allows it; returns when it is here.

        Raises ModelFileNotFound when it does not, and what the download raises.
        """
        entry = self._shelf.find(name)
        name = entry.name if entry is not None else self.reference_of(name).name
        download = self._downloads.get(name)
        if download is None:
            is_listed = entry is not None and entry.is_listed
            if self._auto_pull == "never" or (self._auto_pull == "catalog" and not is_listed):
                raise ModelFileNotFound.of(name, f"`bear pull {name}` fetches it")
            download = self.begin(name)
        assert download.task is not None
        await asyncio.shield(download.task)

    async def cancel(self, name: str) -> int:
        """Stops a download; the bytes that are kept for the next one. Raises ModelNotFound."""
        entry = self._shelf.find(name)
        download = self._downloads.get(entry.name if entry is not None else name)
        if download is None or download.task is None:
            raise ModelNotFound(name)
        download.end()
        await asyncio.wait([download.task])
        return download.progress.completed_bytes

    def reference_of(self, name: str) -> Reference:
        """What a name stands for on the hub. Raises ModelNotFound, InvalidField."""
        entry = self._shelf.find(name)
        if entry is not None and entry.source is not None:
            source = entry.source
            return Reference(source.repo_id, source.file, None, source.revision)
        reference = parse_reference(name) if entry is None else None
        if reference is None:
            self._shelf.get(name)
            raise ModelNotFound(name)
        return reference

    async def look_at(self, reference: Reference) -> ModelEntry:
        """A model on the hub with its header, without downloading it. Raises as `remote.look_at`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._looks, lambda: look_at(self._connected(), reference))

    async def prune(self, *, dry_run: bool) -> list[tuple[Path, int]]:
        """Removes what no model needs: paths relative to the models folder, and their bytes."""
        return await asyncio.to_thread(self._store.prune, dry_run=dry_run)

    async def remove(self, entry: ModelEntry) -> int:
        """Takes a downloaded model off the disk; bytes removed. Raises ModelInUse, ModelFileNotFound."""
        if entry.is_in_use:
            raise ModelInUse(entry.name)
        if entry.name in self._downloads:
            raise ModelInUse(entry.name, "is being downloaded; cancel that first")
        if entry.path is None:
            raise ModelFileNotFound.of(entry.name, "there is nothing to remove")
        manifest = await asyncio.to_thread(self._store.find, entry.name)
        # First from the shelf, so that no load begins while its files go.
        self._shelf.drop(entry.name)
        try:
            return await asyncio.to_thread(self._store.remove, entry.name)
        except OSError:
            if manifest is not None:
                await self._adopt(manifest)
            raise

    async def close(self) -> None:
        """Stops every download; what has come is kept."""
        self._closing = True
        for download in self._downloads.values():
            download.end()
        tasks = [download.task for download in self._downloads.values() if download.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=True)
        self._looks.shutdown(wait=False, cancel_futures=True)
        for hub in (*self._replaced, self._hub):
            if hub is not None:
                await asyncio.to_thread(hub.close)

    def _begin(self, name: str, reference: Reference) -> Download:
        if self._closing:
            raise PullCancelled(name)
        download = self._downloads.get(name)
        if download is None:
            if len(self._downloads) >= MAX_DOWNLOADS:
                raise QueueFull(name, MAX_DOWNLOADS, 30.0, waiting=len(self._downloads), unit="downloads")
            download = self._downloads[name] = Download(name, reference)
            self._shelf.announce(name, HubSource(reference.repo_id, reference.file or "", reference.revision))
            download.task = asyncio.create_task(self._run(download))
            # Nobody may be waiting for it: what it raises is told by the model's status, too.
            download.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return download

    async def _run(self, download: Download) -> None:
        name = download.name
        try:
            self._step(download, PullProgress(PullStage.QUEUED))
            await self._take_turn(download)
            try:
                self._step(download, PullProgress(PullStage.RESOLVING))
                manifest = await self._fetch(download)
            finally:
                self._turn.release()
            await self._adopt(manifest)
        except BearError as exc:
            log.warning("the download of %s failed: %s", name, exc)
            self._shelf.set_pull(name, None, exc)
            raise
        except Exception as exc:
            log.exception("the download of %s failed", name)
            error = BackendError("the download failed")
            self._shelf.set_pull(name, None, error)
            raise error from exc
        else:
            self._shelf.set_pull(name, None)
            log.info("%s is here", name)
        finally:
            del self._downloads[name]
            download.tell()

    async def _take_turn(self, download: Download) -> None:
        """Waits until few enough others run. Raises PullCancelled."""
        turn = asyncio.ensure_future(self._turn.acquire())
        stopped = asyncio.ensure_future(download.stopped.wait())
        try:
            await asyncio.wait({turn, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not turn.done():
                turn.cancel()
                await asyncio.wait({turn})
            if download.stop.is_set() and not turn.cancelled():
                self._turn.release()
        if download.stop.is_set():
            raise PullCancelled(download.name)

    async def _fetch(self, download: Download) -> Manifest:
        """Asks the hub for the files, then has them downloaded; in a thread."""
        loop = asyncio.get_running_loop()
        entry = self._shelf.find(download.name)
        expected = entry.expected_sha256 if entry is not None else ""
        in_use = [file.sha256 for file in entry.files] if entry is not None and entry.is_in_use else []

        def on_progress(progress: PullProgress) -> None:
            loop.call_soon_threadsafe(self._step, download, progress)

        def work() -> Manifest:
            hub = self._connected()
            try:
                resolved = dataclasses.replace(hub.resolve(download.reference), name=download.name)
            except HubUnreachable as exc:
                return self._stored(download.name, exc)
            shas = [file.sha256 for file in resolved.files]
            if expected and shas != [expected]:
                raise ChecksumMismatch(resolved.files[0].file, expected, shas[0])
            if in_use and shas != in_use:
                raise ModelInUse(download.name)
            loop.call_soon_threadsafe(self._resolved, download, resolved)
            pull = Pull(
                self._store,
                hub,
                resolved,
                limiter=self._limiter,
                stop=download.stop,
                on_progress=on_progress,
            )
            return pull.run()

        return await loop.run_in_executor(self._threads, work)

    def _stored(self, name: str, error: HubUnreachable) -> Manifest:
        """What is here of a model whose hub cannot be asked. Blocking. Raises `error` if it is not whole."""
        manifest = self._store.find(name)
        if manifest is None or not self._store.is_whole(manifest):
            raise error
        log.warning("%s stays as it is: %s", name, error)
        return manifest

    def _connected(self) -> Hub:
        """The hub. Blocking, any thread."""
        with self._hub_lock:
            if self._hub is None:
                self._hub = self._open_hub()
            return self._hub

    def _resolved(self, download: Download, resolved: Resolved) -> None:
        download.resolved = resolved
        download.tell()

    def _step(self, download: Download, progress: PullProgress) -> None:
        if download.name in self._downloads:  # a late word of a thread
            download.progress = progress
            self._shelf.set_pull(download.name, progress)
            download.tell()

    async def _adopt(self, manifest: Manifest) -> None:
        """Puts a downloaded model onto the shelf, if all of it is there."""
        if not await asyncio.to_thread(self._store.is_whole, manifest):
            log.warning("%s is not whole any more; it has to be downloaded again", manifest.name)
            return
        path = await asyncio.to_thread(self._store.path, manifest)
        first = manifest.files[0]
        await self._shelf.adopt(
            manifest.name,
            path,
            source=HubSource(manifest.repo_id, first.file, manifest.revision),
            files=[ModelFile(file.file, file.sha256, file.size_bytes) for file in manifest.files],
            sha256=first.sha256 if len(manifest.files) == 1 else "",
            size_bytes=sum(file.size_bytes for file in manifest.files),
        )
