"""Which models the server knows: catalog, registrations, downloads; what is known of each."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from ..config import ConfigError, ModelConfig
from ..errors import BackendError, BearError, InvalidField, ModelExists, ModelInUse
from ..executor.probe import probe
from ..executor.spawner import Spawner
from ..types import HubSource, ModelFile, ModelState, PullProgress, StateReason
from .catalog import CatalogEntry, read_catalog
from .checksums import Checksums
from .costs import CostStore
from .entry import ModelEntry, header_of
from .feed import StatusFeed
from .names import Names
from .origins import configure, from_catalog, from_registration, may_relist, relist
from .registered import Registered
from .registry import Registration, Registry
from .roots import resolve

log = logging.getLogger(__name__)

MAX_PROBES = 2


class Shelf:
    """Event loop only; files are read in other threads."""

    def __init__(
        self,
        *,
        spawner: Spawner,
        registry: Registry,
        costs: CostStore,
        allowed_roots: list[Path],
        configured: Mapping[str, ModelConfig] | None = None,
        catalog: Path | None = None,
    ) -> None:
        """`configured` are settings by model, over the model's own; `catalog` is the user's own file."""
        self.feed = StatusFeed()
        self.set_allowed_roots(allowed_roots)
        self._spawner = spawner
        self._registered = Registered(registry)
        self._costs = costs
        self._configured = configured or {}
        self._catalog_file = catalog
        self._names = Names()
        self._catalog: dict[str, CatalogEntry] = {}
        self._checksums = Checksums()
        # Each takes a core.
        self._probe_turn = asyncio.Semaphore(MAX_PROBES)

    async def open(self) -> None:
        """Reads the catalogs and the registrations. Raises ConfigError for a catalog that is wrong."""
        for item in await asyncio.to_thread(read_catalog, self._catalog_file):
            self._catalog[item.name] = item
            await self._add(from_catalog(item))
        for registration in await self._registered.read():
            try:
                self._names.check_free(registration.name, *registration.aliases)
            except ModelExists as exc:
                log.warning("registration %s is left out: %s", registration.name, exc)
                continue
            self._registered.take(registration)
            await self._add(from_registration(registration))
        unknown = [name for name in self._configured if self._names.find(name) is None]
        if unknown:
            log.warning("settings for unknown models: %s", ", ".join(unknown))

    async def prepare_catalog(self, user: Path | None) -> Callable[[], None] | None:
        """Reads the catalogs anew; gives what takes them over, None if they are as they were.

        Raises ConfigError for a catalog that is wrong.
        """
        items = {item.name: item for item in await asyncio.to_thread(read_catalog, user)}
        if items == self._catalog:
            return None
        self._check_relisting(items)
        return functools.partial(self._relist, items)

    def set_allowed_roots(self, roots: Sequence[Path]) -> None:
        """Other folders for what is registered or loaded from now on; what is loaded stays."""
        self.allowed_roots = [root.resolve() for root in roots]

    def list(self) -> list[ModelEntry]:
        """Every model, by name."""
        return self._names.list()

    def get(self, name: str) -> ModelEntry:
        """A model by name, alias or reference. Raises ModelNotFound with the nearest names."""
        return self._names.get(name)

    def find(self, name: str) -> ModelEntry | None:
        """A model by name, alias or reference, None if there is none."""
        return self._names.find(name)

    def own_name(self, name: str) -> str:
        """The name that permissions are given for: that of the model which `name` means, known or not."""
        return self._names.own_name(name)

    def move(
        self, entry: ModelEntry, state: ModelState, reason: StateReason | None = None, message: str = ""
    ) -> None:
        """Moves a model to another state and tells everybody."""
        entry.move(state, reason, message)
        self.feed.publish(entry.status())

    async def register(self, registration: Registration) -> ModelEntry:
        """Makes a file known, after a check of its header and a dry load by a probe worker.

        Names are taken as checked. Raises InvalidField, ModelExists, PathNotAllowed,
        ModelFileNotFound, ModelFileInvalid.
        """
        names = (registration.name, *registration.aliases)
        self._names.check_free(*names)
        path = await asyncio.to_thread(self.resolve, registration.path)
        header = await asyncio.to_thread(header_of, path)
        async with self._probe_turn:
            await probe(self._spawner, path)
        self._names.check_free(*names)
        registration = msgspec.structs.replace(registration, path=str(path))
        entry = from_registration(registration)
        entry.header = header
        await self._add(entry)
        try:
            await self._registered.write(registration)
        except BackendError:
            self._forget(entry)
            raise
        if entry.sha256:  # it was there before the registration was
            await self._registered.keep_sha256(entry.name, entry.sha256)
        return entry

    async def delete(self, name: str) -> None:
        """Forgets a registered model. Raises ModelNotFound, InvalidField, ModelInUse."""
        entry = self._names.by_own_name(name)
        if not self._registered.has(name):
            raise InvalidField("name", f"{name!r} is no registered model and stays")
        if entry.is_in_use:
            raise ModelInUse(name)
        self._forget(entry)
        await self._registered.remove(name)

    def announce(self, name: str, source: HubSource) -> ModelEntry:
        """The model that is about to be downloaded: one that is known already, or a new one, ABSENT.

        Raises ModelExists if the name belongs to a file of this server.
        """
        entry = self._names.find(name)
        if entry is not None:
            if entry.source is None:
                raise ModelExists(name)
            return entry
        entry = ModelEntry(name, None, False, source=source, state=ModelState.ABSENT)
        self._put(entry)
        self.feed.publish(entry.status())
        return entry

    async def adopt(
        self,
        name: str,
        path: Path,
        *,
        source: HubSource,
        files: Sequence[ModelFile],
        sha256: str,
        size_bytes: int,
    ) -> ModelEntry:
        """Makes a downloaded model AVAILABLE: `path` is what llama.cpp opens, `files` are all of it.

        Of a model that is known by that file already nothing changes. Raises ModelFileNotFound,
        ModelFileInvalid, ModelExists, and ModelInUse while another file of it is loaded.
        """
        header = await asyncio.to_thread(header_of, path)
        cost_tables = await asyncio.to_thread(self._costs.read, path)
        entry = self.announce(name, source)
        if entry.is_in_use:
            if entry.path == path:
                return entry
            raise ModelInUse(name)
        entry.path, entry.source, entry.files = path, source, tuple(files)
        entry.sha256, entry.size_bytes = sha256, size_bytes
        entry.header, entry.cost_tables = header, cost_tables
        if entry.state is ModelState.AVAILABLE:
            self.feed.publish(entry.status())
        else:
            self.move(entry, ModelState.AVAILABLE)
        return entry

    def set_pull(self, name: str, progress: PullProgress | None, failed: BearError | None = None) -> None:
        """Shows how far a download is; None when it has ended, with what it `failed` with.

        A model that was known by its download only is forgotten when that fails.
        """
        entry = self._names.find(name)
        if entry is None:
            return
        entry.pull = progress
        if entry.state is ModelState.ABSENT:
            entry.reason = StateReason.PULL_FAILED if failed is not None else None
            entry.message = failed.message if failed is not None else ""
        self.feed.publish(entry.status())
        if failed is not None and entry.path is None and not entry.is_listed:
            self._forget(entry)

    def drop(self, name: str) -> None:
        """Takes the file of a downloaded model away: ABSENT if a catalog has it, else forgotten.

        Raises ModelNotFound, ModelInUse, and InvalidField for what was not downloaded.
        """
        entry = self._names.get(name)
        if entry.source is None:
            raise InvalidField("name", f"{name!r} was not downloaded")
        if entry.is_in_use:
            raise ModelInUse(entry.name)
        item = self._catalog.get(entry.name)
        if item is None:
            self._forget(entry)
            return
        entry.path, entry.header, entry.files, entry.cost_tables = None, None, (), []
        entry.source, entry.sha256, entry.size_bytes = item.source, item.sha256, item.size_bytes
        if entry.state is not ModelState.ABSENT:
            self.move(entry, ModelState.ABSENT)

    async def close(self) -> None:
        """Ends what runs in the background, and every watcher."""
        await self._checksums.close()
        self.feed.close()

    def resolve(self, path: str) -> Path:
        """See `roots.resolve`, with the folders that this server allows."""
        return resolve(path, self.allowed_roots)

    def _put(self, entry: ModelEntry) -> None:
        settings = self._configured.get(entry.name)
        if settings is not None:
            configure(entry, settings)
        self._names.add(entry)

    async def _add(self, entry: ModelEntry) -> None:
        self._put(entry)
        if entry.path is not None:
            try:
                if entry.header is None:
                    entry.header = await asyncio.to_thread(header_of, entry.path)
                entry.size_bytes = entry.header.file_bytes
                entry.cost_tables = await asyncio.to_thread(self._costs.read, entry.path)
            except BearError as exc:
                entry.state, entry.message = ModelState.ABSENT, exc.message
            if entry.header is not None and not entry.sha256:
                self._checksums.start(entry.path, functools.partial(self._hashed, entry))
        self.feed.publish(entry.status())

    def _relist(self, items: dict[str, CatalogEntry]) -> None:
        """Models that are here or in use stay when a catalog names them no longer."""
        changed = [item for name, item in items.items() if self._catalog.get(name) != item]
        for name in self._catalog.keys() - items.keys():
            gone = self._names.get(name)
            gone.is_listed, gone.expected_sha256, gone.aliases = False, "", ()
            if gone.path is None and gone.pull is None and not gone.is_in_use:
                self._forget(gone)
        self._catalog = items
        known = [(item, self._names.find(item.name)) for item in changed]
        for _, entry in known:
            if entry is not None:
                entry.aliases = ()  # what one gives up another may take
        for item, entry in known:
            if entry is None:
                entry = from_catalog(item)
                self._put(entry)
            else:
                relist(entry, item, self._configured.get(item.name))
            self.feed.publish(entry.status())

    def _check_relisting(self, items: dict[str, CatalogEntry]) -> None:
        """Raises ConfigError where a catalog takes the name of a model that it cannot be."""
        for item in items.values():
            for name in (item.name, *item.aliases):
                entry = self._names.find(name)
                if entry is None or (entry.is_listed and entry.name != item.name):
                    continue  # names inside a catalog are checked where it is read
                if entry.name != item.name or not may_relist(entry, item):
                    raise ConfigError(f"catalog: model {item.name}: {name!r} is a name of {entry.name}")

    async def _hashed(self, entry: ModelEntry, digest: str) -> None:
        entry.sha256 = digest
        if self._names.is_known(entry) and self._registered.has(entry.name):
            await self._registered.keep_sha256(entry.name, digest)

    def _forget(self, entry: ModelEntry) -> None:
        """Its last word is ABSENT."""
        self._names.remove(entry)
        if entry.state is not ModelState.ABSENT:
            entry.move(ModelState.ABSENT)
        self.feed.publish(dataclasses.replace(entry.status(), is_known=False))
