"""Whose call it is. Tenants share the engine's time, and nothing that one could learn of another."""

from __future__ import annotations


def tenant_of(peer: str) -> str:
    """The tenant of a call from `peer`, as gRPC writes it: `ipv4:10.0.0.1:50000`.

    A tenant is a host; all unix sockets are one.
    """
    kind, _, address = peer.partition(":")
    if kind.startswith("unix"):
        return "unix"
    host = address.rpartition(":")[0]
    return f"{kind}:{host or address}"
