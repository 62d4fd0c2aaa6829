"""The keys on the disk: SQLite, written by `bear keys` and read by the server that runs beside it."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from ..params import Priority
from .caller import Quotas, Scope
from .key import DIGEST_BYTES, Key, digest_of, id_of, new_id_and_secret, text_of
from .private import keep_private, make_private

FILE = "keys.sqlite"
_VERSION = 1
_BUSY_S = 5.0
_COLUMNS = "id, secret_sha256, name, scopes, models, priority, quotas, created_s, expires_s, revoked_s"
_TABLE = """
CREATE TABLE keys (
    id TEXT NOT NULL PRIMARY KEY,
    secret_sha256 BLOB NOT NULL,
    name TEXT NOT NULL,
    scopes TEXT NOT NULL,
    models TEXT NOT NULL,
    priority TEXT NOT NULL,
    quotas TEXT NOT NULL,
    created_s REAL NOT NULL,
    expires_s REAL,
    revoked_s REAL
) WITHOUT ROWID
"""


class KeyStoreError(Exception):
    """The keys cannot be read or written; the message says which file and why."""


class KeyStore:
    """The keys in a folder. Blocking; one thread at a time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Makes the file where there is none, for its owner only. Raises KeyStoreError."""
        self.file = folder / FILE
        self._clock = clock
        self._seen: int | None = None
        with self._told():
            make_private(self.file)
            self._base, self._inode = self._open(is_new=True)

    def close(self) -> None:
        """Closes the file."""
        self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create(self, **chosen: Any) -> tuple[Key, str]:
        """A new key with these fields of `Key`, and its text, which is nowhere kept.

        Raises KeyStoreError, also for fields that are wrong.
        """
        key_id, secret = new_id_and_secret()
        key = Key(id=key_id, secret_sha256=digest_of(secret), created_s=self._clock(), **chosen)
        if problems := key.problems():
            raise KeyStoreError("; ".join(problems))
        with self._told(), self._base:
            self._base.execute(f"INSERT INTO keys ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", _row_of(key))
        return key, text_of(key_id, secret)

    def all(self) -> list[Key]:
        """Every key, those that are no longer valid too, the oldest first."""
        with self._told():
            rows = self._base.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created_s, id").fetchall()
            return [_key_of(row) for row in rows]

    def get(self, key_id: str) -> Key | None:
        """The key with this id."""
        with self._told():
            row = self._base.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone()
            return None if row is None else _key_of(row)

    def revoke(self, key_id: str) -> bool:
        """Makes a key invalid for good, from now on; False if it was already, or if there is none."""
        with self._told(), self._base:
            done = self._base.execute(
                "UPDATE keys SET revoked_s = ? WHERE id = ? AND revoked_s IS NULL", (self._clock(), key_id)
            )
        return done.rowcount > 0

    def changed(self) -> list[Key] | None:
        """Every key at the first call and when another process has changed one; else None, at little cost.

        A file that was replaced is opened anew. Raises KeyStoreError, also if it is gone: between the two
        steps of whoever puts a copy in its place there is none.
        """
        with self._told():
            if self._identity() != self._inode:
                keep_private(self.file)
                base, inode = self._open(is_new=False)
                self._base.close()
                self._base, self._inode = base, inode
                self._seen = None  # versions are those of the connection
            (version,) = self._base.execute("PRAGMA data_version").fetchone()
            if version == self._seen:
                return None
            keys = self.all()
            self._seen = version  # asked before the keys: what changes in between is seen again the next time
            return keys

    def _open(self, *, is_new: bool) -> tuple[sqlite3.Connection, tuple[int, int]]:
        """The file, with its identity; makes the table in one that may be new, but no file."""
        inode, no_table = self._identity(), f"{self.file} has no table of keys"
        if not is_new and not self.file.stat().st_size:
            raise KeyStoreError(no_table)  # to read it would remove the log that SQLite has beside it
        uri = f"{self.file.absolute().as_uri()}?mode=rw"
        base = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, check_same_thread=False)
        try:
            base.execute("PRAGMA journal_mode = WAL")
            base.execute("PRAGMA synchronous = FULL")  # a revocation must outlive a loss of power
            with base:
                base.execute("BEGIN IMMEDIATE")
                (version,) = base.execute("PRAGMA user_version").fetchone()
                if version == 0 and not is_new:
                    raise KeyStoreError(no_table)
                if version == 0:
                    base.execute(_TABLE)
                    base.execute(f"PRAGMA user_version = {_VERSION}")
            if version > _VERSION:
                raise KeyStoreError(f"{self.file} was written by a later version of bear_grpc")
        except BaseException:
            base.close()
            raise
        return base, inode

    def _identity(self) -> tuple[int, int]:
        status = self.file.stat()
        return (status.st_dev, status.st_ino)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise KeyStoreError(f"{self.file}: {exc}") from exc
        except OSError as exc:
            raise KeyStoreError(f"{exc.filename or self.file}: {exc.strerror}") from exc
        except (ValueError, msgspec.MsgspecError) as exc:
            raise KeyStoreError(f"{self.file}: a key is damaged: {exc}") from exc


def _row_of(key: Key) -> tuple[Any, ...]:
    return (
        key.id,
        key.secret_sha256,
        key.name,
        msgspec.json.encode(sorted(key.scopes)).decode(),
        msgspec.json.encode(key.models).decode(),
        key.priority.name.lower(),
        msgspec.json.encode(key.quotas).decode(),
        key.created_s,
        key.expires_s,
        key.revoked_s,
    )


def _key_of(row: tuple[Any, ...]) -> Key:
    key_id, secret_sha256, name, scopes, models, priority, quotas, created_s, expires_s, revoked_s = row
    if id_of(key_id) != key_id or len(secret_sha256) != DIGEST_BYTES:
        raise ValueError(f"{key_id!r} has no id or no hash of a key")
    return Key(
        id=key_id,
        secret_sha256=secret_sha256,
        name=name,
        scopes=msgspec.json.decode(scopes, type=frozenset[Scope]),
        models=msgspec.json.decode(models, type=tuple[str, ...] | None),
        priority=_priority_of(priority),
        quotas=msgspec.json.decode(quotas, type=Quotas),
        created_s=created_s,
        expires_s=expires_s,
        revoked_s=revoked_s,
    )


def _priority_of(name: str) -> Priority:
    try:
        return Priority[name.upper()]
    except KeyError:
        raise ValueError(f"there is no priority {name!r}") from None
