"""The two HTTP servers of the stand-in hub: the hub itself, and the storage that it redirects to."""

from __future__ import annotations

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from tests.helpers.hub import Fault, File, StandInHub

Host = Literal["hub", "storage"]
CHUNK_BYTES = 2**16


class Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], host: Host, hub: StandInHub) -> None:
        super().__init__(address, {"hub": HubHandler, "storage": StorageHandler}[host])
        self.host, self.hub = host, hub
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        with self._open_lock:
            for connection in self._open:
                end_connection(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # clients leave when they like
            self.hub.errors.append(error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in the hub's list."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        hub.record(self.server.host, self.command, self.path, dict(self.headers.items()))
        self.answer(hub, urlsplit(self.path))

    def answer(self, hub: StandInHub, url: SplitResult) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self, hub: StandInHub, found: list[tuple[str, Fault]]) -> bool:
        """Whether a fault has answered already."""
        knows = hub.is_known_reader(self.headers.get("Authorization"))
        for target, fault in found:
            status, times = fault.status
            if hub.due(target, "status", times):
                self.reply(status, b'{"error": "as asked for"}')
            elif hub.due(target, "rate_limited", fault.rate_limited):
                self.reply(429, **({} if fault.retry_after is None else {"Retry_After": fault.retry_after}))
            elif fault.gated and not knows:
                status = 403 if "Authorization" in self.headers else 401
                self.reply(status, X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted.")
            elif fault.private and not knows:
                self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            else:
                continue
            return True
        return False


class HubHandler(Handler):
    def answer(self, hub: StandInHub, url: SplitResult) -> None:
        # A revision may have slashes, which come quoted.
        parts = [unquote(part) for part in url.path.removeprefix("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) == 6 and parts[4] == "revision":
            self.describe(hub, "/".join(parts[2:4]), parts[5], with_blobs="blobs" in parse_qs(url.query))
        elif parts[2:3] == ["resolve"] and len(parts) >= 5:
            self.redirect(hub, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(404)

    def find(self, hub: StandInHub, repo_id: str, revision: str) -> tuple[str, dict[str, File]] | None:
        """Commit and files, or None where the answer is given: there are none."""
        try:
            found = hub.find(repo_id, revision)
        except KeyError:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        if found is None:
            self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return found

    def describe(self, hub: StandInHub, repo_id: str, revision: str, *, with_blobs: bool) -> None:
        faults = hub.faults(repo_id)
        if self.refused(hub, faults):
            return
        found = self.find(hub, repo_id, revision)
        if found is None:
            return
        commit, files = found
        answer: Any = {
            "id": repo_id,
            "modelId": repo_id,
            "private": False,
            "gated": False,
            "sha": commit,
            "siblings": [
                {"rfilename": name, **(file.described() if with_blobs else {})}
                for name, file in files.items()
            ],
        }
        headers = {"Content-Type": "application/json"}
        for target, fault in faults:
            if hub.due(target, "detours", fault.detours):
                self.reply(307, Location=self.path)
                return
            headers.update(fault.listing_headers)
            if fault.listing is not None:
                answer = fault.listing(answer)
        self.reply(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode(), **headers)

    def redirect(self, hub: StandInHub, repo_id: str, revision: str, name: str) -> None:
        faults = hub.faults(name, repo_id)
        if self.refused(hub, faults):
            return
        found = self.find(hub, repo_id, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            return
        file = files[name]
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(file.size),
            "Location": hub.sign(repo_id, name, file),
        }
        for target, fault in reversed(faults):
            if hub.due(target, "detours", fault.detours):
                headers["Location"] = self.path
            headers.update(fault.headers)
        self.reply(302, **headers)


class StorageHandler(Handler):
    def answer(self, hub: StandInHub, url: SplitResult) -> None:
        repo_id, name, file = hub.signed(url.path)
        faults = hub.faults(name, repo_id)
        for target, fault in faults:
            status, times = fault.storage_status
            if hub.due(target, "storage_status", times):
                self.reply(status)
                return
        start, stop = 0, file.size
        wanted = self.headers.get("Range")
        if any(fault.ignore_range for _, fault in faults):
            wanted = None
        if wanted is not None:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else file.size, file.size)
            if start >= file.size:
                self.reply(416, Content_Range=f"bytes */{file.size}")
                return
        self.send_range(hub, faults, file, start, stop, is_part=wanted is not None)

    def send_range(
        self,
        hub: StandInHub,
        faults: list[tuple[str, Fault]],
        file: File,
        start: int,
        stop: int,
        *,
        is_part: bool,
    ) -> None:
        lie = sum(fault.wrong_length for _, fault in faults)
        shift = sum(fault.shift_range for _, fault in faults)
        length = stop - start + (0 if is_part else lie)
        headers: dict[str, str | None] = {"Content-Length": str(length), "ETag": f'"{file.sha256}"'}
        if is_part:
            headers["Content-Range"] = f"bytes {start + shift}-{stop - 1}/{file.size + lie}"
        if not any(fault.ignore_range for _, fault in faults):
            headers["Accept-Ranges"] = "bytes"
        for _, fault in reversed(faults):
            headers.update(fault.storage_headers)
        self.send_response(206 if is_part else 200)
        for header, value in headers.items():
            if value is not None:
                self.send_header(header, value)
        if headers["Content-Length"] is None:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = [fault.cut[0] for target, fault in faults if hub.due(target, "cut", fault.cut[1])]
        end = min([stop, *(start + count for count in cuts)])
        flip = any(hub.due(target, "corrupt", fault.corrupt) for target, fault in faults)
        for offset in range(start, end, CHUNK_BYTES):
            if offset > start:
                self.wait(hub, faults)
            chunk = file.read(offset, min(CHUNK_BYTES, end - offset))
            if flip and offset == start:
                chunk = bytes([chunk[0] ^ 0xFF]) + chunk[1:]
            self.wfile.write(chunk)
            for _, fault in faults:
                if fault.on_chunk is not None:
                    fault.on_chunk(offset + len(chunk))
        if end < stop:
            self.close_connection = True
            end_connection(self.connection)

    def wait(self, hub: StandInHub, faults: list[tuple[str, Fault]]) -> None:
        for _, fault in faults:
            while fault.slow is not None and not fault.slow.wait(0.02) and not hub.closing.is_set():
                pass


def end_connection(connection: socket.socket) -> None:
    """Ends a connection in the middle of whatever it does."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was first
