"""The ports and sockets of the server: each with its own security, and with the services that it serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc.aio

from ..config import ConfigError
from ..transport import Listener, Tls
from .certificates import Certificates
from .identity import Trusted

log = logging.getLogger(__name__)

S = TypeVar("S")
ALL, ADMIN, HEALTH = "all", "admin", "health"
# For a socket that somebody listens on.
ANSWER_S = 1.0


class _Kind(NamedTuple):
    serves: str
    trusted: bool


class Listeners:
    """A gRPC server for each kind of listener: a port of gRPC's own has all services of its server.

    First `add` services, then `bind`, then `start`.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        tls: Tls,
        options: Sequence[tuple[str, int]],
        interceptors: Sequence[grpc.aio.ServerInterceptor],
    ) -> None:
        """`interceptors` are those of every server; the first is the outermost."""
        self._listeners, self._tls = listeners, tls
        self._servers: dict[_Kind, grpc.aio.Server] = {}
        outermost, *others = interceptors
        for kind in dict.fromkeys(map(_kind, listeners)):
            between = [Trusted()] if kind.trusted else []
            self._servers[kind] = grpc.aio.server(
                options=list(options), interceptors=[outermost, *between, *others]
            )

    def add(self, add_to_server: Callable[[S, Any], Any], servicer: S, *where: str) -> None:
        """Serves it on the listeners of these kinds, by a function such as `add_HealthServicer_to_server`."""
        for kind, server in self._servers.items():
            if kind.serves in where:
                add_to_server(servicer, server)

    def bind(self) -> list[str]:
        """Takes every address; gives them with the ports that were chosen.

        Raises ConfigError for one that cannot be bound, and for certificates that cannot be used.
        """
        encrypted = any(listener.tls != "off" for listener in self._listeners)
        certificates = Certificates(self._tls) if encrypted else None
        return [self._bind(listener, certificates) for listener in self._listeners]

    def _bind(self, listener: Listener, certificates: Certificates | None) -> str:
        server, address = self._servers[_kind(listener)], listener.address
        try:
            with _socket_of(listener):
                if certificates is None or listener.tls == "off":
                    port = server.add_insecure_port(address)
                else:
                    credentials = certificates.credentials(mutual=listener.tls == "mutual")
                    port = server.add_secure_port(address, credentials)
        except RuntimeError as exc:
            raise ConfigError(f"listen: cannot bind {address} (in use, or not this machine's)") from exc
        except OSError as exc:
            raise ConfigError(f"listen: {address}: {exc.filename}: {exc.strerror}") from exc
        return address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        """Takes connections."""
        for server in self._servers.values():
            await server.start()

    async def stop(self, grace_s: float) -> None:
        """Takes no more; calls have so long to end."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers.values()))


def _kind(listener: Listener) -> _Kind:
    return _Kind(listener.serves, listener.trusted)


@contextlib.contextmanager
def _socket_of(listener: Listener) -> Iterator[None]:
    """What is bound within has the listener's mode, if it is a file; its folder is there."""
    path = listener.socket
    if path is None:
        yield
        return
    _prepare(path.parent, listener.bits)
    if _answers(path):
        raise ConfigError(f"listen: cannot bind {listener.address} (another server listens there)")
    before = os.umask(0o177)  # never wider than its mode, not even for a moment
    try:
        yield
    finally:
        os.umask(before)
    path.chmod(listener.bits)


def _answers(path: Path) -> bool:
    """Whether somebody listens on the socket, which gRPC would take away; else it is left over."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(ANSWER_S)
        try:
            client.connect(str(path))
        except TimeoutError:
            return True  # its queue is full
        except OSError:
            return False
        return True


def _prepare(folder: Path, bits: int) -> None:
    """Makes the folder, for those who may open a socket with these bits; warns of one open to everybody."""
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
        folder.chmod(0o700 | (0o050 if bits & 0o060 else 0) | (0o005 if bits & 0o006 else 0))
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        log.warning("everybody may write in %s, and so replace the socket there by one of their own", folder)
