"""What was used by whom, of which model, on which day: SQLite, read by `bear usage`."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from .private import make_private

FILE = "usage.sqlite"
# A server that is used less often forgets nothing.
RECENT_DAYS = 7
_VERSION = 1
_BUSY_S = 5.0
_TABLE = """
CREATE TABLE usage (
    day TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    PRIMARY KEY (day, key_id, model)
) WITHOUT ROWID
"""


class Totals(NamedTuple):
    """Sums over calls; `prompt_tokens` include `cached_tokens`, `requests` include `errors`."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    errors: int = 0

    def plus(self, other: Totals) -> Totals:
        """The sum."""
        return Totals(*(mine + more for mine, more in zip(self, other, strict=True)))


class Group(NamedTuple):
    """What sums are kept of. `day` is a date of UTC as 2026-11-29.

    Without a key the caller was anonymous; without a model the call did not get one.
    """

    day: str
    key_id: str
    model: str


_COLUMNS = ", ".join((*Group._fields, *Totals._fields))
_MARKS = ", ".join("?" for _ in (*Group._fields, *Totals._fields))
_ADD = f"INSERT INTO usage ({_COLUMNS}) VALUES ({_MARKS}) ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{name} = {name} + excluded.{name}" for name in Totals._fields
)


class UsageError(Exception):
    """Usage cannot be read or written; the message says which file and why."""


def day_of(seconds: float, days_before: int = 0) -> str:
    """The date of UTC at this time since 1970, or of a day so many before."""
    return (datetime.fromtimestamp(seconds, UTC) - timedelta(days=days_before)).date().isoformat()


class UsageStore:
    """The sums in a folder. Blocking; one thread at a time. Everything raises UsageError."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._base: sqlite3.Connection | None = None
        self._inode = (0, 0)

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self._base is not None:
            self._base.close()
            self._base = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, sums: Mapping[Group, Totals], forget_at_s: float | None = None, keep_days: int = 0) -> None:
        """Adds to what is there, all or nothing; at this time all but the last `keep_days` are forgotten.

        They are only if something is known of the RECENT_DAYS before: a clock that jumps ahead must not
        empty the record. Makes the file where there is none, for its owner only.
        """
        with self._opened() as base, base:
            base.executemany(_ADD, [(*group, *totals) for group, totals in sums.items()])
            if forget_at_s is not None:
                base.execute(
                    "DELETE FROM usage WHERE day < ? "
                    "AND EXISTS (SELECT * FROM usage AS recent WHERE recent.day >= ? AND recent.day < ?)",
                    [day_of(forget_at_s, before) for before in (keep_days - 1, RECENT_DAYS, 0)],
                )

    def read(
        self, since: str = "", key_id: str | None = None, model: str | None = None
    ) -> dict[Group, Totals]:
        """The sums from a day on, of one key, of one model; nothing if nothing was ever kept."""
        if not self.file.exists():
            return {}
        with self._opened() as base:
            rows = base.execute(
                f"SELECT {_COLUMNS} FROM usage WHERE day >= ? AND (? IS NULL OR key_id = ?) "
                "AND (? IS NULL OR model = ?) ORDER BY day, key_id, model",
                (since, key_id, key_id, model, model),
            ).fetchall()
        width = len(Group._fields)
        return {Group(*row[:width]): Totals(*row[width:]) for row in rows}

    def tokens_on(self, day: str) -> dict[str, int]:
        """The tokens of a day, prompts and answers, by key."""
        found: dict[str, int] = {}
        for group, totals in self.read(since=day).items():
            if group.day == day:
                tokens = totals.prompt_tokens + totals.completion_tokens
                found[group.key_id] = found.get(group.key_id, 0) + tokens
        return found

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The file, opened anew after a failure or if another one is in its place."""
        try:
            if self._base is not None and self._identity() != self._inode:
                self.close()
            if self._base is None:
                self._base = self._open()
            yield self._base
        except (sqlite3.Error, OSError) as exc:
            with contextlib.suppress(sqlite3.Error):
                self.close()
            problem = exc.strerror if isinstance(exc, OSError) else exc
            raise UsageError(f"{self.file}: {problem}") from exc

    def _open(self) -> sqlite3.Connection:
        make_private(self.file)
        base = sqlite3.connect(self.file, timeout=_BUSY_S, check_same_thread=False)
        try:
            base.execute("PRAGMA journal_mode = WAL")
            # The end of a process loses nothing; a loss of power may take the last seconds.
            base.execute("PRAGMA synchronous = NORMAL")
            with base:
                base.execute("BEGIN IMMEDIATE")
                (version,) = base.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    base.execute(_TABLE)
                    base.execute(f"PRAGMA user_version = {_VERSION}")
            if version > _VERSION:
                raise UsageError(f"{self.file} was written by a later version of bear_grpc")
        except BaseException:
            base.close()
            raise
        self._inode = self._identity()
        return base

    def _identity(self) -> tuple[int, int]:
        try:
            status = self.file.stat()
        except FileNotFoundError:
            return (0, 0)
        return (status.st_dev, status.st_ino)
