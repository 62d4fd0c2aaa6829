"""The registrations that stand, in memory and on the disk."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from ..errors import BackendError
from .registry import Registration, Registry

log = logging.getLogger(__name__)


class Registered:
    """What is on the disk follows what is in memory, one change after the other. Event loop only.

    Registrations are as they were asked for: the server's configuration over
    them is not written back.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._kept: dict[str, Registration] = {}
        self._writing = asyncio.Lock()

    async def read(self) -> list[Registration]:
        """Those on the disk; they stand from `take` on."""
        return await asyncio.to_thread(self._registry.read)

    def take(self, registration: Registration) -> None:
        """Lets a registration stand that is on the disk."""
        self._kept[registration.name] = registration

    def has(self, name: str) -> bool:
        """Whether a model is a registered one."""
        return name in self._kept

    async def write(self, registration: Registration) -> None:
        """Lets a new one stand. Raises BackendError; then it does not."""
        self.take(registration)
        try:
            await self._write(registration.name)
        except OSError as exc:
            self._kept.pop(registration.name, None)
            raise BackendError(f"the registration cannot be written ({exc.strerror})") from exc

    async def keep_sha256(self, name: str, sha256: str) -> None:
        """Adds what has been computed, unless the model has been forgotten; a failure is told in the log."""
        if name not in self._kept:
            return
        self._kept[name] = msgspec.structs.replace(self._kept[name], sha256=sha256)
        try:
            await self._write(name)
        except OSError as exc:
            log.warning("the checksum of %s is not kept: %s", name, exc.strerror)

    async def remove(self, name: str) -> None:
        """Forgets one at once, then on the disk."""
        del self._kept[name]
        async with self._writing:
            if name not in self._kept:  # not registered anew meanwhile
                await asyncio.to_thread(self._registry.remove, name)

    async def _write(self, name: str) -> None:
        async with self._writing:
            registration = self._kept.get(name)
            if registration is not None:
                await asyncio.to_thread(self._registry.write, registration)
