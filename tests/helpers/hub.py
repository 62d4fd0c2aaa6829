"""A stand-in for the model hub: the endpoints that the real client calls, on loopback, with faults on demand.

Files are served from a second host, to which the first one redirects, as the hub does. Every fault is a
`Fault` of a file, a repository or everything; none of them depends on time.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.helpers.hub_servers import Host, Server

EVERYTHING = "*"
ALWAYS = 10**9
Listing = Callable[[dict[str, Any]], Any]
SIGNATURE = "signature-of-the-hub"  # part of the addresses of the storage host: a secret, too


@dataclass(frozen=True)
class Request:
    """What was asked: `host` is "hub" or "storage", `range` the header as it came."""

    host: Host
    method: str
    path: str
    range: str | None
    has_authorization: bool
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Fault:
    """What goes wrong. Counts are of answers: so many, then it goes right (ALWAYS: never again)."""

    cut: tuple[int, int] = (0, 0)  # the connection ends after so many bytes of the answer, so many times
    slow: threading.Event | None = None  # waited for before every chunk but the first of an answer
    on_chunk: Callable[[int], None] | None = None  # told the offset in the file after each chunk
    corrupt: int = 0  # the answer's first byte is flipped
    gated: bool = False
    private: bool = False
    rate_limited: int = 0
    retry_after: str | None = "7"
    status: tuple[int, int] = (0, 0)  # this status, so many times
    storage_status: tuple[int, int] = (0, 0)  # the same from the storage host
    ignore_range: bool = False
    wrong_length: int = 0  # added to the lengths that are told
    shift_range: int = 0  # added to the first byte that Content-Range tells
    headers: Mapping[str, str] = field(default_factory=dict)  # of the hub's answers for a file, over its own
    storage_headers: Mapping[str, str | None] = field(default_factory=dict)  # None: not sent
    detours: int = 0  # redirects within the hub before the one to the storage
    listing_headers: Mapping[str, str] = field(default_factory=dict)
    # Changes the description of a repository; bytes are sent as they are.
    listing: Listing | None = None


@dataclass(frozen=True)
class File:
    data: bytes | Path
    sha256: str
    size: int

    def read(self, start: int, count: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[start : start + count]
        with self.data.open("rb") as file:
            file.seek(start)
            return file.read(count)

    def described(self) -> dict[str, Any]:
        """As the hub's listing has it."""
        return {"size": self.size, "lfs": {"sha256": self.sha256, "size": self.size, "pointerSize": 134}}


class StandInHub:
    """A context manager; `url` is the endpoint. With a `token`, gated and private things open to it."""

    def __init__(self, token: str = "") -> None:
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self._token = token
        self._heads: dict[tuple[str, str], str] = {}
        self._commits: dict[str, tuple[str, dict[str, File]]] = {}
        self._signed: dict[str, tuple[str, str, File]] = {}
        self._faults: dict[str, Fault] = {}
        self._used: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self.closing = threading.Event()

    def __enter__(self) -> StandInHub:
        self.url = self._serve("127.0.0.1", "hub")
        try:
            self.storage_url = self._serve("127.0.0.2", "storage")
        except OSError:  # macOS has one loopback address: another port is another origin, too
            self.storage_url = self._serve("127.0.0.1", "storage")
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._stack.close()
        assert not self.errors, self.errors

    def add(self, repo_id: str, file: str, data: bytes | Path, *, revision: str = "main") -> str:
        """Adds or replaces a file, as one commit; its SHA-256. A Path is served from the disk."""
        if isinstance(data, Path):
            with data.open("rb") as source:
                sha256 = hashlib.file_digest(source, "sha256").hexdigest()
            size = data.stat().st_size
        else:
            sha256, size = hashlib.sha256(data).hexdigest(), len(data)
        with self._lock:
            head = self._heads.get((repo_id, revision))
            files = dict(self._commits[head][1]) if head else {}
            files[file] = File(data, sha256, size)
            text = json.dumps([repo_id, revision, {name: each.sha256 for name, each in files.items()}])
            commit = hashlib.sha1(text.encode()).hexdigest()
            self._heads[repo_id, revision] = commit
            self._commits[commit] = (repo_id, files)
        return sha256

    def commit(self, repo_id: str, revision: str = "main") -> str:
        """The commit that a revision stands for now."""
        return self._heads[repo_id, revision]

    def fail(self, target: str, **knobs: Any) -> None:
        """Faults of a file, a repository or EVERYTHING, over those that it has; see `Fault`."""
        with self._lock:
            self._faults[target] = replace(self._faults.get(target, Fault()), **knobs)
            for knob in knobs:
                self._used.pop((target, knob), None)

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._faults.clear()

    def asked(self, host: Host) -> list[Request]:
        """Requests to one of the hosts, in order."""
        with self._lock:
            return [request for request in self.requests if request.host == host]

    def _serve(self, address: str, host: Host) -> str:
        server = Server((address, 0), host, self)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(server.server_close)  # waits for the threads of connections
        self._stack.callback(server.end_connections)
        self._stack.callback(server.shutdown)
        return f"http://{address}:{server.server_address[1]}"

    # What handlers ask.

    def record(self, host: Host, method: str, path: str, headers: Mapping[str, str]) -> None:
        told = {name.lower(): value for name, value in headers.items()}
        request = Request(host, method, path, told.get("range"), "authorization" in told, told)
        with self._lock:
            self.requests.append(request)

    def is_known_reader(self, authorization: str | None) -> bool:
        return bool(self._token) and authorization == f"Bearer {self._token}"

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, File]] | None:
        """Commit and files; None: no such revision. Raises KeyError for an unknown repository."""
        with self._lock:
            if not any(known == repo_id for known, _ in self._heads):
                raise KeyError(repo_id)
            commit = self._heads.get((repo_id, revision), revision)
            owner, files = self._commits.get(commit, ("", {}))
            return (commit, files) if owner == repo_id else None

    def faults(self, *targets: str) -> list[tuple[str, Fault]]:
        """The faults that concern an answer, of the narrowest target first."""
        with self._lock:
            return [
                (target, self._faults[target]) for target in (*targets, EVERYTHING) if target in self._faults
            ]

    def due(self, target: str, knob: str, times: int) -> bool:
        """Whether a counted fault goes wrong this time; counts it."""
        with self._lock:
            used = self._used.get((target, knob), 0)
            if used >= times:
                return False
            self._used[target, knob] = used + 1
            return True

    def sign(self, repo_id: str, name: str, file: File) -> str:
        """Where the storage host has a file."""
        path = quote(f"/{repo_id}/{name}/{file.sha256}")
        with self._lock:
            self._signed[path] = (repo_id, name, file)
        return f"{self.storage_url}{path}?sign={SIGNATURE}"

    def signed(self, path: str) -> tuple[str, str, File]:
        with self._lock:
            return self._signed[path]
