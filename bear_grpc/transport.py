"""What is listened on: addresses, TLS, the modes of sockets. Settings and their checks; nothing is opened."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

DEFAULT_SOCKET_MODE = "0600"
_OTHERS = 0o007
_MODE = re.compile("0?[0-7]{3}")


def _about(description: str) -> msgspec.Meta:
    """For the reference of the settings."""
    return msgspec.Meta(description=description)


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `[tls]`: PEM files. They are read again when they change, by the next connection."""

    certificate: Annotated[Path | None, _about("the server's certificate, and those above it")] = None
    key: Annotated[Path | None, _about("its private key, without a passphrase")] = None
    client_ca: Annotated[
        Path | None, _about("who signs clients' certificates; `listen` then takes no client without one")
    ] = None


class Listener(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of `[[listeners]]`."""

    address: Annotated[str, _about("`HOST:PORT` or `unix:PATH`")]
    tls: Annotated[
        Literal["off", "on", "mutual"],
        _about("plaintext; TLS; TLS that takes no client without a certificate of `tls.client_ca`"),
    ] = "off"
    serves: Annotated[
        Literal["all", "admin", "health"],
        _about("every service; all but inference, on this machine only; health only, for probes"),
    ] = "all"
    trusted: Annotated[bool, _about("of a unix socket: who can open it may do everything, without a key")] = (
        False
    )
    mode: Annotated[str, _about("of a unix socket's file; empty: `socket_mode`")] = ""

    @property
    def is_local(self) -> bool:
        """Whether it can be reached from this machine only."""
        return is_local(self.address)

    @property
    def socket(self) -> Path | None:
        """The file of a unix socket."""
        kind, _, path = self.address.partition(":")
        return Path(re.sub("^//+", "/", path)) if kind == "unix" else None

    @property
    def bits(self) -> int:
        """The mode of the socket's file, which is given."""
        return int(self.mode, 8)


def listeners_of(
    listen: Sequence[str], listeners: Sequence[Listener], tls: Tls, socket_mode: str
) -> list[Listener]:
    """All listeners in full: those of `listen` speak TLS over TCP where there is a certificate."""
    kind: Literal["off", "on", "mutual"] = "off"
    if tls.certificate is not None:
        kind = "on" if tls.client_ca is None else "mutual"
    simple = [Listener(address, tls="off" if address.startswith("unix") else kind) for address in listen]
    return [
        msgspec.structs.replace(listener, mode=listener.mode or socket_mode)
        for listener in (*simple, *listeners)
    ]


def problems(
    listeners: Sequence[Listener], tls: Tls, *, keys_are_asked: bool, insecure_public: bool
) -> Iterator[str]:
    """What is wrong with listeners as `listeners_of` makes them; each names its setting."""
    if not listeners:
        yield "listen: at least one address is needed, here or in [[listeners]]"
    if (tls.certificate is None) != (tls.key is None):
        yield f"tls.{'certificate' if tls.certificate is None else 'key'}: is needed beside the other"
    if tls.client_ca is not None and tls.certificate is None:
        yield "tls.certificate: is needed with tls.client_ca"
    addresses = Counter(listener.address for listener in listeners if not listener.address.endswith(":0"))
    for address, count in addresses.items():
        if count > 1:
            yield f"listen: {address} is there twice"
    for listener in listeners:
        yield from _problems_of(listener, tls)
        if listener.is_local or listener.serves != "all" or insecure_public:
            continue
        if lacking := _lacking(listener, keys_are_asked):
            yield (
                f"listen: other machines can reach {listener.address}, which {' and '.join(lacking)}; "
                "[tls] and auth = 'keys' make it safe, insecure_public = true serves it as it is"
            )


def _problems_of(listener: Listener, tls: Tls) -> Iterator[str]:
    name = f"listeners[{listener.address}]"
    if _MODE.fullmatch(listener.mode) is None:
        yield f"socket_mode: must be octal digits such as 0660, is {listener.mode!r}"
        return
    if listener.tls != "off" and tls.certificate is None:
        yield f"{name}.tls: needs tls.certificate and tls.key"
    if listener.tls == "mutual" and tls.client_ca is None:
        yield f"{name}.tls: mutual needs tls.client_ca"
    if listener.serves == "admin" and not listener.is_local:
        yield f"{name}.serves: admin is for loopback and unix sockets only"
    if listener.trusted and (listener.socket is None or listener.bits & _OTHERS):
        yield f"{name}.trusted: is for unix sockets whose mode gives nothing to others"


def _lacking(listener: Listener, keys_are_asked: bool) -> list[str]:
    lacking = []
    if listener.tls == "off":
        lacking.append("has no TLS")
    if not keys_are_asked and listener.tls != "mutual":
        lacking.append("asks nobody for a key")
    return lacking


def is_local(address: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
