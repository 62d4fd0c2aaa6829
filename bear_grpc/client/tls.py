"""TLS of a channel: whom the client trusts, and the certificate that it shows."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import grpc

SCHEME = "grpcs://"


@dataclasses.dataclass(frozen=True, slots=True)
class Tls:
    """PEM files, read when a client is made. Each may be given as bytes, too.

    Without `ca` the authorities that gRPC brings are trusted. `certificate`, with those above it, and `key`
    are for servers that ask for a client certificate. `server_name` is what the server's certificate must
    be for; unset: the host of the target.
    """

    ca: str | os.PathLike[str] | bytes | None = None
    certificate: str | os.PathLike[str] | bytes | None = None
    key: str | os.PathLike[str] | bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises OSError for a file that cannot be read, ValueError for half a pair."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and a key its certificate")
        return grpc.ssl_channel_credentials(*map(_pem, (self.ca, self.key, self.certificate)))


def address_of(target: str) -> str:
    """The target as gRPC takes it: `grpcs://HOST:PORT` without its scheme."""
    return target.removeprefix(SCHEME)


def tls_of(target: str, tls: Tls | bool) -> Tls | None:
    """What a client asked for, in full; None for plaintext. `grpcs://` asks for TLS, too."""
    if isinstance(tls, Tls):
        return tls
    return Tls() if tls or target.startswith(SCHEME) else None


def _pem(given: str | os.PathLike[str] | bytes | None) -> bytes | None:
    return given if given is None or isinstance(given, bytes) else Path(given).read_bytes()
