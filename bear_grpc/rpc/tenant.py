"""Whose call it is: between tenants nothing is shared that one could learn of the other."""

from __future__ import annotations


def scope_of(peer: str, sharing: str) -> str:
    """The scope of prefix sharing of a call from `peer`, as gRPC writes it: `ipv4:10.0.0.1:50000`.

    Empty if all share (`sharing` other than "tenant"). A tenant is a host; all unix
    sockets are one.
    """
    if sharing != "tenant":
        return ""
    kind, _, address = peer.partition(":")
    if kind.startswith("unix"):
        return "unix"
    host = address.rpartition(":")[0]
    return f"{kind}:{host or address}"
