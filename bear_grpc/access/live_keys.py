"""The keys of a running server: read again when `bear keys` has changed them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from .authentication import Authenticator
from .keys import KeyStore, KeyStoreError

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class LiveKeys:
    """Event loop only; the file is read in other threads."""

    def __init__(self, folder: Path, authenticator: Authenticator, on_tick: Callable[[], None]) -> None:
        """`on_tick` is called about every second, when the keys are as they are on the disk."""
        self._folder = folder
        self._authenticator = authenticator
        self._on_tick = on_tick
        self._store: KeyStore | None = None
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._closing = asyncio.Event()
        self._problem = ""

    async def open(self) -> None:
        """Reads the keys and goes on reading. Raises KeyStoreError."""
        self._store = await asyncio.to_thread(KeyStore, self._folder)
        keys = await asyncio.to_thread(self._store.changed)
        self._authenticator.replace(keys or [])
        if not self._authenticator.count:
            log.warning("there are no keys, so nobody may call; `bear keys create` makes one")
        self._task = asyncio.create_task(self._follow())

    async def refresh(self) -> None:
        """Reads what has changed now. Without an answer of the disk the keys stay as they were."""
        async with self._turn:
            assert self._store is not None
            try:
                keys = await asyncio.to_thread(self._store.changed)
            except KeyStoreError as exc:
                if str(exc) != self._problem:  # once, not every second
                    log.error("keys cannot be read, those known before stay in force: %s", exc)
                self._problem = str(exc)
            else:
                if self._problem:
                    log.info("keys can be read again")
                self._problem = ""
                if keys is not None:
                    self._authenticator.replace(keys)
                    log.info("keys were changed: %d are known", len(keys))
            self._on_tick()

    async def close(self) -> None:
        """Ends the reading."""
        self._closing.set()
        if self._task is not None:
            await asyncio.wait([self._task])  # not cancelled: a thread of it could still be reading
        async with self._turn:
            if self._store is not None:
                await asyncio.to_thread(self._store.close)

    async def _follow(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), PERIOD_S)
                return
            try:
                await self.refresh()
            except Exception:
                log.exception("reading the keys failed")
