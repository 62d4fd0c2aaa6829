"""Who has a client certificate: the names in it, and what the settings let such a name do."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

import msgspec

from ..params import Priority
from .caller import ALL_SCOPES, Caller, Quotas, Scope

# As gRPC names them; a certificate's subject is no identity.
_URI, _OTHERS = "peer_uri", ("peer_dns", "peer_email", "peer_ip")
# Clients with more different certificates than this are looked up anew.
_MAX_KEPT = 4096


def _about(description: str) -> msgspec.Meta:
    """For the reference of the settings."""
    return msgspec.Meta(description=description)


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table `[identities."NAME"]`: what clients with this name in their certificate may do.

    NAME is a pattern (`*`, `?`) of a subject alternative name. One with `://` is of URIs such as
    `spiffe://example.org/*`, others are of DNS names, e-mail and IP addresses.
    """

    scopes: Annotated[frozenset[Scope], _about("`infer`, `models:read`, `models:admin`, `server:admin`")] = (
        frozenset({Scope.INFER, Scope.MODELS_READ})
    )
    models: Annotated[tuple[str, ...] | None, _about("patterns of the models it may use; unset: all")] = None
    priority: Annotated[
        Literal["high", "normal", "low"], _about("the most urgent that its requests can be")
    ] = "high"
    tenant: Annotated[
        str, _about("whom its share of the engine's time is taken from; empty: each name's own")
    ] = ""
    quotas: Quotas = Quotas()

    def caller(self, name: str) -> Caller:
        """The caller of a certificate with this name."""
        return Caller(
            id=name,
            tenant=self.tenant or name,
            scopes=self.scopes,
            models=self.models,
            priority=Priority[self.priority.upper()],
            quotas=self.quotas,
        )


# Where nobody is asked what they may do, a name is only told.
EVERYBODY = {pattern: Identity(scopes=ALL_SCOPES) for pattern in ("*://*", "*")}


def names_of(auth_context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """The subject alternative names of a verified client certificate, URIs first; none without one."""
    return tuple(
        name.decode(errors="replace") for kind in (_URI, *_OTHERS) for name in auth_context.get(kind, ())
    )


class Identities:
    """From the names in a certificate to who calls. Event loop only."""

    def __init__(self, identities: Mapping[str, Identity] | None = None) -> None:
        self.replace(identities or {})

    def replace(self, identities: Mapping[str, Identity]) -> None:
        """These are the identities from now on, for calls to come."""
        self._identities = dict(identities)
        self._found: dict[tuple[str, ...], Caller | None] = {}

    def caller_of(self, names: tuple[str, ...]) -> Caller | None:
        """Who has a certificate with these names; None for none that is known.

        A name that stands in the settings wins over a pattern, earlier patterns over later ones.
        """
        if names not in self._found:
            if len(self._found) >= _MAX_KEPT:
                self._found.clear()
            self._found[names] = next(self._matches(names), None)
        return self._found[names]

    def _matches(self, names: tuple[str, ...]) -> Iterator[Caller]:
        for name in names:
            if name in self._identities:
                yield self._identities[name].caller(name)
        for pattern, identity in self._identities.items():
            for name in names:
                is_uri = "://" in name
                if ("://" in pattern) == is_uri and fnmatch.fnmatchcase(name, pattern):
                    yield identity.caller(name)
