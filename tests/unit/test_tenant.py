"""Tenants of calls without a key: one for each host, one for all unix sockets."""

from __future__ import annotations

import pytest

from bear_grpc.access.caller import tenant_of


@pytest.mark.parametrize(
    ("peer", "tenant"),
    [
        ("ipv4:10.0.0.1:50000", "ipv4:10.0.0.1"),
        ("ipv4:10.0.0.1:50001", "ipv4:10.0.0.1"),
        ("ipv4:10.0.0.2:50000", "ipv4:10.0.0.2"),
        ("ipv6:%5B::1%5D:50000", "ipv6:%5B::1%5D"),
        ("ipv6:[2001:db8::1]:50000", "ipv6:[2001:db8::1]"),
        ("unix:", "unix"),
        ("unix:/run/bear.sock", "unix"),
        ("unix-abstract:bear", "unix"),
        ("other", "other:"),
    ],
)
def test_tenant_is_the_host_without_port(peer, tenant):
    assert tenant_of(peer) == tenant
