"""The keys of a running server: read again when `bear keys` has changed them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from .authentication import Authenticator
from .disk_thread import DiskThread
from .keys import KeyStore, KeyStoreError

log = logging.getLogger(__name__)

PERIOD_S = 1.0
# A read that takes longer is told as one that fails.
SLOW_S = 5.0
# What the file gets to be closed: a disk that hangs holds up no stop.
CLOSE_S = 5.0


class LiveKeys:
    """Event loop only; the file is read in a thread of its own."""

    def __init__(self, folder: Path, authenticator: Authenticator, on_tick: Callable[[], None]) -> None:
        """`on_tick` is called about every second, also while the disk hangs, and after every read."""
        self._folder = folder
        self._authenticator = authenticator
        self._on_tick = on_tick
        self._disk = DiskThread("keys")
        self._store: KeyStore | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._turn = asyncio.Lock()
        self._problem = ""

    async def open(self) -> None:
        """Reads the keys and goes on reading. Raises KeyStoreError."""
        self._store = await self._disk.run(lambda: KeyStore(self._folder))
        keys = await self._disk.run(self._store.changed)
        self._authenticator.replace(keys or [])
        if not self._authenticator.count:
            log.warning("there are no keys, so nobody may call; `bear keys create` makes one")
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._tick())]

    async def refresh(self) -> None:
        """Reads what has changed now. Without an answer of the disk the keys stay as they were."""
        async with self._turn:
            assert self._store is not None
            reading = self._disk.run(self._store.changed)
            try:
                done, _ = await asyncio.wait({reading}, timeout=SLOW_S)
                if not done:
                    self._tell("the disk does not answer")
                keys = await reading
            except KeyStoreError as exc:
                self._tell(str(exc))
            else:
                if self._problem:
                    log.info("keys can be read again")
                self._problem = ""
                if keys is not None:
                    self._authenticator.replace(keys)
                    log.info("keys were changed: %d are known", len(keys))
            finally:
                reading.cancel()
            self._on_tick()

    async def close(self) -> None:
        """Ends the reading, within CLOSE_S."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if not await self._disk.close(self._close_store, CLOSE_S):
            log.error("the keys' file stays open: the disk does not answer")

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()

    def _tell(self, problem: str) -> None:
        if problem != self._problem:  # once, not every second
            log.error("keys cannot be read, those known before stay in force: %s", problem)
        self._problem = problem

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.refresh()
            except Exception:
                log.exception("reading the keys failed")

    async def _tick(self) -> None:
        """Keys expire by the clock, whatever the disk does."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self._on_tick()
            except Exception:
                log.exception("calls of keys that are no longer valid could not be ended")
