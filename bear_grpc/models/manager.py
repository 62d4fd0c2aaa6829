"""The models of a server: what it knows, what is loaded, who waits for a load."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import hashlib
import logging
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ..config import ModelConfig
from ..errors import (
    BackendError,
    BearError,
    Draining,
    InvalidField,
    LoadConflict,
    ModelAlreadyLoaded,
    ModelExists,
    ModelInUse,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnloaded,
    PathNotAllowed,
)
from ..executor.executor import ExecutorLimits, ModelExecutor
from ..executor.probe import probe
from ..executor.share import CpuShare
from ..executor.spawner import Spawner
from ..protocol import Progress
from ..types import GenerationDefaults, LoadOptions, ModelState, StateReason, check
from .catalog import read_catalog
from .entry import ModelEntry, header_of
from .feed import StatusFeed
from .registry import Registration, Registry

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_HASH_CHUNK_BYTES = 4 * 2**20


@dataclasses.dataclass(slots=True, frozen=True)
class Unloaded:
    """What an unload gave back, and how many requests it cut."""

    released_bytes: int
    cancelled: int


class ModelManager:
    """Event loop only. Loads and unloads go on when their callers leave."""

    def __init__(
        self,
        *,
        spawner: Spawner,
        registry: Registry,
        allowed_roots: list[Path],
        limits: ExecutorLimits,
        cores: int,
        configured: Mapping[str, ModelConfig] | None = None,
    ) -> None:
        self.feed = StatusFeed()
        self.allowed_roots = [root.resolve() for root in allowed_roots]
        self._spawner = spawner
        self._registry = registry
        self._limits = limits
        self._cores = cores
        self._configured = configured or {}
        self._share = CpuShare()
        self._entries: dict[str, ModelEntry] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unloads: dict[str, asyncio.Task[Unloaded]] = {}
        self._hashing: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()
        self.draining = False

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
        raise ModelNotFound(name, difflib.get_close_matches(name, names, n=3))

    async def load(self, name: str, options: LoadOptions | None = None) -> tuple[ModelEntry, float]:
        """Loads a model, joins a load under way, or finds it loaded; with the seconds it took.

        Raises LoadConflict, ModelAlreadyLoaded, and what the load raises.
        """
        entry = self.get(name)
        task = self._begin_load(entry, options or LoadOptions())
        if task is None:
            return entry, 0.0
        await asyncio.shield(task)
        return entry, entry.load_seconds

    async def executor(self, name: str, *, load_if_needed: bool = True) -> ModelExecutor:
        """The executor of a model, loaded first if need be and allowed.

        Raises ModelNotLoaded, ModelUnloaded, Draining, and what the load raises.
        """
        if self.draining:
            raise Draining()
        entry = self.get(name)
        if entry.state is ModelState.UNLOADING:
            raise ModelUnloaded(entry.name)
        if entry.state is not ModelState.READY:
            if not load_if_needed and entry.state is not ModelState.LOADING:
                raise ModelNotLoaded(entry.name)
            await self.load(entry.name)
        if entry.executor is None:
            raise ModelUnloaded(entry.name)
        return entry.executor

    async def unload(self, name: str, drain_timeout_s: float) -> Unloaded:
        """Ends a model's worker; joins an unload under way. Raises ModelNotLoaded."""
        entry = self.get(name)
        task = self._unloads.get(entry.name)
        if task is None:
            if entry.state not in (ModelState.LOADING, ModelState.READY):
                raise ModelNotLoaded(entry.name)
            task = asyncio.create_task(self._unload(entry, drain_timeout_s))
            self._unloads[entry.name] = task
            task.add_done_callback(lambda _: self._unloads.pop(entry.name))
        return await asyncio.shield(task)

    async def register(self, registration: Registration) -> ModelEntry:
        """Makes a file known, after a check of its header and a dry load by a probe worker.

        Raises InvalidField, ModelExists, PathNotAllowed, ModelFileNotFound, ModelFileInvalid.
        """
        for field, name in [("name", registration.name), *(("aliases", a) for a in registration.aliases)]:
            if not _NAME.fullmatch(name):
                raise InvalidField(field, f"must match {_NAME.pattern}, is {name!r}")
        check(registration.load_options.violations("load_options"))
        self._check_free(registration)
        path = await asyncio.to_thread(self._resolve, registration.path)
        header = await asyncio.to_thread(header_of, path)
        await probe(self._spawner, path)
        self._check_free(registration)
        entry = _entry_of(registration)
        entry.path, entry.header = path, header
        await self._add(entry)
        try:
            await asyncio.to_thread(self._registry.write, _registration_of(entry))
        except OSError as exc:
            del self._entries[entry.name]
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
        del self._entries[name]
        entry.move(ModelState.ABSENT)
        await asyncio.to_thread(self._registry.remove, name)
        self.feed.publish(entry.status())

    async def close(self) -> None:
        """Ends every worker and every waiter."""
        self.draining = True
        self._closing.set()
        busy = [entry.name for entry in self._entries.values() if entry.executor is not None]
        await asyncio.gather(*(self.unload(name, 0.0) for name in busy), return_exceptions=True)
        await asyncio.gather(*self._hashing, return_exceptions=True)
        self.feed.close()

    def _owner_of(self, name: str) -> ModelEntry | None:
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        return next((entry for entry in self._entries.values() if name in entry.aliases), None)

    def _check_free(self, registration: Registration) -> None:
        for name in (registration.name, *registration.aliases):
            if self._owner_of(name) is not None:
                raise ModelExists(name)

    def _resolve(self, path: str) -> Path:
        """The file that a path leads to. Whether it may be used is asked before whether it exists."""
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

    async def _add(self, entry: ModelEntry) -> None:
        own = self._configured.get(entry.name)
        if own is not None:
            entry.load_options = own.load_options.over(entry.load_options)
            entry.defaults = _over(own.defaults, entry.defaults)
        self._entries[entry.name] = entry
        try:
            entry.header = entry.header or await asyncio.to_thread(header_of, entry.path)
            entry.size_bytes = entry.header.file_bytes
        except BearError as exc:
            entry.state, entry.message = ModelState.ABSENT, exc.message
        if entry.header is not None and not entry.sha256:
            task = asyncio.create_task(self._hash(entry))
            self._hashing.add(task)
            task.add_done_callback(self._hashing.discard)
        self.feed.publish(entry.status())

    async def _hash(self, entry: ModelEntry) -> None:
        digest = await asyncio.to_thread(_sha256, entry.path, self._closing)
        if digest and self._entries.get(entry.name) is entry:
            entry.sha256 = digest
            if not entry.is_embedded:
                await asyncio.to_thread(self._registry.write, _registration_of(entry))

    def _begin_load(self, entry: ModelEntry, options: LoadOptions) -> asyncio.Task[None] | None:
        """The task of a load, begun or joined; None if the model is loaded as asked."""
        if self.draining:
            raise Draining()
        match entry.state:
            case ModelState.READY:
                assert entry.ready is not None
                if differing := options.differing(entry.ready.options):
                    raise ModelAlreadyLoaded(entry.name, differing)
                return None
            case ModelState.LOADING:
                if options.differing(entry.asked):
                    raise LoadConflict(entry.name, "is being loaded with other options")
                return self._loads[entry.name]
            case ModelState.UNLOADING:
                raise LoadConflict(entry.name, "is being unloaded")
        entry.move(ModelState.LOADING)
        entry.asked = options.over(entry.load_options)
        task = asyncio.create_task(self._load(entry))
        self._loads[entry.name] = task
        task.add_done_callback(functools.partial(self._load_done, entry))
        return task

    def _load_done(self, entry: ModelEntry, task: asyncio.Task[None]) -> None:
        del self._loads[entry.name]
        error = task.exception()
        if error is not None:
            log.warning("loading %s failed: %s", entry.name, error)

    async def _load(self, entry: ModelEntry) -> None:
        began = time.monotonic()

        def on_progress(progress: Progress) -> None:
            entry.stage, entry.fraction = progress.stage, progress.fraction
            self.feed.publish(entry.status())

        def on_crash(how: str) -> None:
            self._move(entry, ModelState.FAILED, StateReason.WORKER_CRASHED, f"the worker ended: {how}")

        entry.executor = executor = ModelExecutor(
            entry.name,
            spawner=self._spawner,
            share=self._share,
            limits=self._limits,
            on_progress=on_progress,
            on_crash=on_crash,
        )
        self.feed.publish(entry.status())
        try:
            entry.header = await asyncio.to_thread(header_of, entry.path)
            entry.ready = await executor.load(entry.path, entry.asked, self._cores)
        except asyncio.CancelledError:
            self._move(entry, ModelState.AVAILABLE)
            raise ModelUnloaded(entry.name) from None
        except BearError as exc:
            self._move(entry, ModelState.FAILED, StateReason.LOAD_FAILED, exc.message)
            raise
        except Exception as exc:
            log.exception("loading %s failed", entry.name)
            self._move(entry, ModelState.FAILED, StateReason.LOAD_FAILED, "internal error")
            raise BackendError("the load failed") from exc
        entry.load_seconds = time.monotonic() - began
        self._move(entry, ModelState.READY)
        log.info("%s is ready after %.2f s", entry.name, entry.load_seconds)

    async def _unload(self, entry: ModelEntry, drain_timeout_s: float) -> Unloaded:
        executor = entry.executor
        if entry.state is ModelState.LOADING or executor is None:
            task = self._loads[entry.name]
            task.cancel()
            await asyncio.wait([task])
            return Unloaded(0, 0)
        self._move(entry, ModelState.UNLOADING)
        cancelled = await executor.drain(drain_timeout_s)
        held = executor.memory_bytes
        await executor.stop()
        self._move(entry, ModelState.AVAILABLE)
        log.info("%s is unloaded, %d bytes are free again", entry.name, held)
        return Unloaded(held, cancelled)

    def _move(
        self, entry: ModelEntry, state: ModelState, reason: StateReason | None = None, message: str = ""
    ) -> None:
        entry.move(state, reason, message)
        self.feed.publish(entry.status())


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


def _registration_of(entry: ModelEntry) -> Registration:
    return Registration(
        entry.name, str(entry.path), list(entry.aliases), entry.defaults, entry.load_options, entry.sha256
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
