"""Which models the server knows: catalog and registrations, by name and alias."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..config import ModelConfig
from ..errors import (
    BackendError,
    BearError,
    InvalidField,
    ModelExists,
    ModelInUse,
    ModelNotFound,
    PathNotAllowed,
)
from ..executor.probe import probe
from ..executor.spawner import Spawner
from ..params import GenerationDefaults
from ..types import ModelState
from .catalog import read_catalog
from .costs import CostStore
from .entry import ModelEntry, header_of
from .feed import StatusFeed
from .registry import Registration, Registry

log = logging.getLogger(__name__)

MAX_NAME_CHARS = 128
MAX_PROBES = 2
_HASH_CHUNK_BYTES = 4 * 2**20


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
    ) -> None:
        self.feed = StatusFeed()
        self.allowed_roots = [root.resolve() for root in allowed_roots]
        self._spawner = spawner
        self._registry = registry
        self._costs = costs
        self._configured = configured or {}
        self._entries: dict[str, ModelEntry] = {}
        # As they were asked for: the server's configuration over them is not written back.
        self._registrations: dict[str, Registration] = {}
        # One file at a time, and few probes: both take a core, and threads that others wait for.
        self._hash_turn = asyncio.Semaphore(1)
        self._probe_turn = asyncio.Semaphore(MAX_PROBES)
        self._hashing: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()
        # What is on the disk follows what is in memory, one change after the other.
        self._writing = asyncio.Lock()

    async def open(self) -> None:
        """Reads the catalog and the registrations."""
        for item in read_catalog():
            entry = ModelEntry(item.name, item.path, True, item.description, tuple(item.aliases))
            entry.defaults, entry.load_options = item.defaults, item.load_options
            await self._add(entry)
        for registration in await asyncio.to_thread(self._registry.read):
            if self._owner_of(registration.name) is not None:
                log.warning("registration %s is left out: the name is taken", registration.name)
                continue
            self._registrations[registration.name] = registration
            await self._add(_entry_of(registration))
        unknown = [name for name in self._configured if name not in self._entries]
        if unknown:
            log.warning("settings for unknown models: %s", ", ".join(unknown))

    def list(self) -> list[ModelEntry]:
        """Every model, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def get(self, name: str) -> ModelEntry:
        """A model by name or alias. Raises ModelNotFound with the nearest names."""
        owner = self._owner_of(name)
        if owner is not None:
            return owner
        names = [known for entry in self._entries.values() for known in (entry.name, *entry.aliases)]
        # The search for similar names takes as long as the name is.
        near = difflib.get_close_matches(name, names, n=3) if len(name) <= MAX_NAME_CHARS else []
        raise ModelNotFound(name, near)

    async def register(self, registration: Registration) -> ModelEntry:
        """Makes a file known, after a check of its header and a dry load by a probe worker.

        Names are taken as checked. Raises InvalidField, ModelExists, PathNotAllowed,
        ModelFileNotFound, ModelFileInvalid.
        """
        self._check_free(registration)
        path = await asyncio.to_thread(self.resolve, registration.path)
        header = await asyncio.to_thread(header_of, path)
        async with self._probe_turn:
            await probe(self._spawner, path)
        self._check_free(registration)
        registration = msgspec.structs.replace(registration, path=str(path))
        entry = _entry_of(registration)
        entry.header = header
        self._registrations[entry.name] = registration
        await self._add(entry)
        try:
            await self._write(entry)
        except OSError as exc:
            del self._entries[entry.name], self._registrations[entry.name]
            raise BackendError(f"the registration cannot be written ({exc.strerror})") from exc
        return entry

    async def delete(self, name: str) -> None:
        """Forgets a registered model. Raises ModelNotFound, InvalidField, ModelInUse."""
        entry = self._entries.get(name)
        if entry is None:
            self.get(name)
            raise InvalidField("name", "must be the model's name, not an alias")
        if entry.is_embedded:
            raise InvalidField("name", f"{name!r} ships with the server and stays")
        if entry.executor is not None:
            raise ModelInUse(name)
        del self._entries[name], self._registrations[name]
        if entry.state is not ModelState.ABSENT:
            entry.move(ModelState.ABSENT)
        async with self._writing:
            await asyncio.to_thread(self._registry.remove, name)
        self.feed.publish(entry.status())

    async def close(self) -> None:
        """Ends what runs in the background, and every watcher."""
        self._closing.set()
        await asyncio.gather(*self._hashing, return_exceptions=True)
        self.feed.close()

    def resolve(self, path: str) -> Path:
        """The file that a path leads to. Blocking. Raises InvalidField, PathNotAllowed.

        Whether it may be used is asked before whether it exists.
        """
        if not path:
            raise InvalidField("path", "is required")
        if "\0" in path or not Path(path).is_absolute():
            raise InvalidField("path", "must be an absolute path on the server")
        try:
            real = Path(path).resolve()
        except (OSError, RuntimeError) as exc:
            raise PathNotAllowed(path) from exc
        if not any(real.is_relative_to(root) for root in self.allowed_roots):
            raise PathNotAllowed(path)
        return real

    def _owner_of(self, name: str) -> ModelEntry | None:
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        return next((entry for entry in self._entries.values() if name in entry.aliases), None)

    def _check_free(self, registration: Registration) -> None:
        for name in (registration.name, *registration.aliases):
            if self._owner_of(name) is not None:
                raise ModelExists(name)

    async def _add(self, entry: ModelEntry) -> None:
        own = self._configured.get(entry.name)
        if own is not None:
            entry.load_options = own.load_options.over(entry.load_options)
            entry.defaults = _over(own.defaults, entry.defaults)
        self._entries[entry.name] = entry
        try:
            if entry.header is None:
                entry.header = await asyncio.to_thread(header_of, entry.path)
            entry.size_bytes = entry.header.file_bytes
            entry.cost_tables = await asyncio.to_thread(self._costs.read, entry.path)
        except BearError as exc:
            entry.state, entry.message = ModelState.ABSENT, exc.message
        if entry.header is not None and not entry.sha256:
            task = asyncio.create_task(self._hash(entry))
            self._hashing.add(task)
            task.add_done_callback(self._hashing.discard)
        self.feed.publish(entry.status())

    async def _hash(self, entry: ModelEntry) -> None:
        async with self._hash_turn:
            digest = await asyncio.to_thread(_sha256, entry.path, self._closing)
        if digest:
            entry.sha256 = digest
            if not entry.is_embedded:
                try:
                    await self._write(entry)
                except OSError as exc:
                    log.warning("the checksum of %s is not kept: %s", entry.name, exc.strerror)

    async def _write(self, entry: ModelEntry) -> None:
        """Puts a registration on the disk, unless the model has been forgotten meanwhile."""
        async with self._writing:
            if self._entries.get(entry.name) is entry:
                registration = self._registrations[entry.name]
                registration = msgspec.structs.replace(registration, sha256=entry.sha256)
                await asyncio.to_thread(self._registry.write, registration)


def _over(own: GenerationDefaults, base: GenerationDefaults) -> GenerationDefaults:
    values = {name: getattr(own, name) for name in own.__struct_fields__}
    return GenerationDefaults(**{n: getattr(base, n) if v is None else v for n, v in values.items()})


def _entry_of(registration: Registration) -> ModelEntry:
    return ModelEntry(
        registration.name,
        Path(registration.path),
        False,
        aliases=tuple(registration.aliases),
        defaults=registration.defaults,
        load_options=registration.load_options,
        sha256=registration.sha256,
    )


def _sha256(path: Path, stop: threading.Event) -> str:
    """Lower case hex; empty if `stop` was set or the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                if stop.is_set():
                    return ""
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
