"""Settings of a running server: which parts take new values, all of them or none."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec

from .config import ConfigError, ServerConfig
from .config.fields import reloading, shape_of

log = logging.getLogger(__name__)

# Puts in force what has been prepared; must not fail.
Commit = Callable[[], None]
Prepare = Callable[[ServerConfig], Awaitable[Commit | None]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    names: tuple[str, ...]
    prepare: Prepare
    has_files: bool


class Reloads:
    """Takes over changed settings. Event loop only.

    A part first prepares, where it may refuse, and only when all have done so it commits: settings that
    are wrong in one place change nothing anywhere.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config  # in force
        self._parts: list[_Part] = []
        self._turn = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        """The settings and tables that some part takes over."""
        return [name for part in self._parts for name in part.names]

    def add(self, *names: str, apply: Callable[[ServerConfig], None]) -> None:
        """`apply` is called when one of these settings, or one of these tables, has changed.

        Its argument is what is in force from now on: of settings that need a restart the old values.
        """

        async def prepare(config: ServerConfig) -> Commit:
            return lambda: apply(config)

        self._parts.append(_Part(names, prepare, has_files=False))

    def add_files(self, *names: str, prepare: Prepare) -> None:
        """`prepare` is called at each reload, since what the settings name may have changed, too.

        It reads and checks, and gives what puts the new content in force, None if nothing has changed.
        It may raise ConfigError.
        """
        self._parts.append(_Part(names, prepare, has_files=True))

    async def reload(self, read: Callable[[], ServerConfig]) -> None:
        """Reads the settings, in a thread, and takes over those that can be; the log tells which."""
        async with self._turn:
            try:
                told = await self._reload(await asyncio.to_thread(read))
            except ConfigError as exc:
                log.error("nothing is reloaded: %s", exc)
            except Exception:
                log.exception("nothing is reloaded")
            else:
                log.info("%s", told)

    async def _reload(self, new: ServerConfig) -> str:
        may_change = reloading()
        old_values, new_values = dict(_values(self.config)), dict(_values(new))
        differ = [
            name
            for name in (new_values | old_values)
            if name not in old_values or name not in new_values or old_values[name] != new_values[name]
        ]
        taken = {name for name in differ if name in may_change and self._part_of(name)}
        config = _merged(self.config, new, taken)
        commits: list[Commit] = []
        for part in self._parts:
            own = {name for name in taken if _is_of(name, part.names)}
            if not own and not part.has_files:
                continue
            commit = await part.prepare(config)
            if commit is not None:
                commits.append(commit)
                taken |= own or {part.names[0]}
        self.config = config
        for commit in commits:
            try:
                commit()
            except Exception:
                log.exception("a part of the server has not taken over its settings")
        order = [*new_values]
        told = "reloaded: " + (", ".join(sorted(taken, key=order.index)) or "nothing has changed")
        left = [name for name in differ if name not in taken]
        return told + (f"; needs a restart: {', '.join(left)}" if left else "")

    def _part_of(self, name: str) -> bool:
        return any(_is_of(name, part.names) for part in self._parts)


def _is_of(name: str, names: tuple[str, ...]) -> bool:
    return any(name == own or name.startswith(f"{own}.") for own in names)


def _values(struct: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name; many tables of a kind are one value."""
    for field in msgspec.structs.fields(struct):
        value, shape = getattr(struct, field.name), shape_of(field.type)
        if shape.struct is not None and not shape.is_tables and value is not None:
            yield from _values(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _merged(old: Any, new: Any, taken: set[str], prefix: str = "") -> Any:
    """The old settings with the new values of those that are taken over."""
    changes = {}
    for field in msgspec.structs.fields(old):
        name, shape = prefix + field.name, shape_of(field.type)
        before, after = getattr(old, field.name), getattr(new, field.name)
        if name in taken:
            changes[field.name] = after
        elif shape.struct is not None and not shape.is_tables and before is not None and after is not None:
            changes[field.name] = _merged(before, after, taken, f"{name}.")
    return msgspec.structs.replace(old, **changes)
