"""How many streams may be open, and whose."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from bear_grpc.errors import QuotaExceeded
from bear_grpc.rpc.open_streams import OpenStreams


def opened(streams: OpenStreams, tenant: str, stack: ExitStack) -> int:
    """Opens as many as it may."""
    count = 0
    with pytest.raises(QuotaExceeded):
        while True:
            stack.enter_context(streams.one(tenant))
            count += 1
    return count


def test_one_tenant_opens_as_many_as_there_may_be() -> None:
    with ExitStack() as stack:
        assert opened(OpenStreams(8), "a", stack) == 8


def test_a_tenant_that_has_opened_all_keeps_nobody_else_out() -> None:
    streams = OpenStreams(8)
    with ExitStack() as stack:
        assert [opened(streams, tenant, stack) for tenant in "abc"] == [8, 4, 2]


def test_all_together_open_twice_as_many_at_most() -> None:
    streams = OpenStreams(8)
    with ExitStack() as stack:
        assert sum(opened(streams, f"{number}", stack) for number in range(100)) <= 16


def test_one_that_has_ended_makes_room() -> None:
    streams = OpenStreams(1)
    for _ in range(3):
        with streams.one("a"), pytest.raises(QuotaExceeded) as caught, streams.one("a"):
            pass
        assert caught.value.metadata == {"subject": "a", "quota": "concurrent_streams", "limit": "1"}
        assert caught.value.retry_after_s
