"""The server's certificate from its files, which may change while it runs."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path

import grpc
import msgspec

from ..config import ConfigError
from ..transport import Tls

log = logging.getLogger(__name__)

# Device, inode, size and time of change of each file; zeros for one that is not there.
_Stamp = tuple[tuple[int, ...], ...]


class _Pems(msgspec.Struct, frozen=True, eq=False):
    certificate: bytes
    key: bytes
    client_ca: bytes | None


class Certificates:
    """Certificate, key and client CA as they were last found good.

    The files are looked at before every handshake, on gRPC's threads. A change takes effect for connections
    to come; those that are there go on. Files that cannot be used are told of once and leave the old ones
    in force.
    """

    def __init__(self, tls: Tls) -> None:
        """Reads the files. Raises ConfigError."""
        if tls.certificate is None or tls.key is None:
            raise ConfigError("tls.certificate and tls.key: both are needed")
        self._certificate, self._key, self._client_ca = tls.certificate, tls.key, tls.client_ca
        self._lock = threading.Lock()
        self._stamp = self._stamp_of_files()
        try:
            self._pems = self._read()
        except (OSError, ValueError) as exc:
            raise ConfigError(f"tls: {_told(exc)}") from exc

    def credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        """For a port; `mutual` takes no client without a certificate that the client CA signed."""
        given = self.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            pems = self.current()
            if pems is given:
                return None  # what gRPC has stays
            given = pems
            return _configuration(pems, mutual)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given, mutual),
            fetch,  # type: ignore[arg-type]  # may give None, which its stub does not know
            require_client_authentication=mutual,
        )

    def current(self) -> _Pems:
        """What the files have, or had when they were last good. Any thread; reads them if they changed."""
        with self._lock:
            stamp = self._stamp_of_files()
            if stamp == self._stamp:
                return self._pems
            try:
                pems = self._read()
            except (OSError, ValueError) as exc:
                problem: str | None = _told(exc)
            else:
                problem = None
            if stamp != self._stamp_of_files():
                return self._pems  # they change right now: the next handshake looks again
            self._stamp = stamp  # what is wrong with these files is told once
            if problem is not None:
                log.error("the old certificate stays in force, the new one cannot be used: %s", problem)
            else:
                self._pems = pems
                log.info("a new certificate is in force for new connections: %s", self._certificate)
            return self._pems

    def _stamp_of_files(self) -> _Stamp:
        return tuple(map(_stamp, (self._certificate, self._key, self._client_ca)))

    def _read(self) -> _Pems:
        """Raises OSError for a file that cannot be read, ValueError for one that cannot be used."""
        client_ca = None if self._client_ca is None else self._client_ca.read_bytes()
        pems = _Pems(self._certificate.read_bytes(), self._key.read_bytes(), client_ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An empty passphrase fails; without one OpenSSL would ask at the terminal.
            context.load_cert_chain(self._certificate, self._key, password="")
        except ssl.SSLError as exc:
            raise ValueError(f"{self._certificate} and {self._key}: {_reason(exc)}") from exc
        if client_ca is not None:
            try:
                context.load_verify_locations(cadata=client_ca.decode("ascii", errors="replace"))
            except (ssl.SSLError, ValueError) as exc:
                raise ValueError(f"{self._client_ca}: has no certificate that can be read") from exc
        return pems


def _configuration(pems: _Pems, mutual: bool) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(pems.key, pems.certificate)], pems.client_ca if mutual else None
    )


def _stamp(file: Path | None) -> tuple[int, ...]:
    try:
        found = None if file is None else file.stat()
    except OSError:
        found = None
    return (0,) if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _told(exc: OSError | ValueError) -> str:
    return f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) else str(exc)


def _reason(exc: ssl.SSLError) -> str:
    return (exc.reason or "no certificate and key that can be read").replace("_", " ").lower()
