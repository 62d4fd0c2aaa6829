"""Who calls: an identity, and what it may do. Without keys everybody may do everything."""

from __future__ import annotations

import enum
import fnmatch
from typing import Annotated

import msgspec
from msgspec import Meta

from ..params import Priority


class Scope(enum.StrEnum):
    """What a key may be for."""

    INFER = "infer"
    MODELS_READ = "models:read"
    MODELS_ADMIN = "models:admin"
    SERVER_ADMIN = "server:admin"


ALL_SCOPES = frozenset(Scope)


# Checked where settings and keys are read; the constructor takes any.
Count = Annotated[int, Meta(ge=1)]


class Quotas(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one identity; None: none. Days are those of UTC."""

    requests_per_minute: Annotated[Count | None, Meta(description="calls of the InferenceService")] = None
    tokens_per_minute: Annotated[Count | None, Meta(description="prompt and drawn tokens")] = None
    concurrent_streams: Annotated[Count | None, Meta(description="generations under way")] = None
    tokens_per_day: Annotated[Count | None, Meta(description="prompt and drawn tokens of a day in UTC")] = (
        None
    )


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a call.

    `id` is a key's, or what a client certificate says; empty where nobody is asked who they are.
    `tenant` is what the engine's time is shared between. `models` are patterns of names, None: all.
    """

    id: str = ""
    tenant: str = ""
    scopes: frozenset[Scope] = ALL_SCOPES
    models: tuple[str, ...] | None = None
    priority: Priority = Priority.HIGH
    quotas: Quotas = Quotas()

    def may(self, scope: Scope) -> bool:
        """Whether it has the scope."""
        return scope in self.scopes

    def may_use(self, model: str) -> bool:
        """Whether it may know of the model."""
        return self.models is None or any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)


def tenant_of(peer: str) -> str:
    """The tenant of an anonymous call from `peer`, as gRPC writes it: `ipv4:10.0.0.1:50000`.

    A tenant is a host; all unix sockets are one.
    """
    kind, _, address = peer.partition(":")
    if kind.startswith("unix"):
        return "unix"
    host = address.rpartition(":")[0]
    return f"{kind}:{host or address}"
