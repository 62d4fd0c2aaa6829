"""Scopes of prefix sharing: one for each host, one for all unix sockets, none where all share."""

from __future__ import annotations

import pytest

from bear_grpc.rpc.tenant import scope_of


@pytest.mark.parametrize(
    ("peer", "scope"),
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
def test_scope_of_a_tenant_is_the_host_without_port(peer, scope):
    assert scope_of(peer, "tenant") == scope


@pytest.mark.parametrize("sharing", ["all", "off"])
def test_scope_is_empty_where_hosts_do_not_count(sharing):
    assert scope_of("ipv4:10.0.0.1:50000", sharing) == ""
