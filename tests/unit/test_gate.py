"""The gate: what is inside, who waits, and what its closing does to both."""

from __future__ import annotations

import asyncio

import pytest

from bear_grpc.errors import Draining
from bear_grpc.models.gate import Gate


async def test_it_is_empty_when_the_last_call_has_left() -> None:
    gate = Gate()
    with gate.enter():
        with gate.enter():
            assert gate.inside == 2
        assert not await gate.empty(0)
    assert await gate.empty(0)


async def test_a_closed_gate_takes_nothing_and_lets_what_is_inside_go_on() -> None:
    gate = Gate()
    with gate.enter():
        gate.close()
        assert gate.is_closed
        with pytest.raises(Draining), gate.enter():
            pass
        with pytest.raises(Draining):
            async with gate.waiting():
                pass
        assert gate.inside == 1
    assert await gate.empty(0)


async def test_a_gate_may_be_closed_again_while_its_waits_end() -> None:
    gate = Gate()

    async def wait() -> None:
        async with gate.waiting():
            await asyncio.Event().wait()

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    gate.close()
    await asyncio.sleep(0)  # the wait is ending, and the one who waits has not run yet
    gate.close()
    with pytest.raises(Draining):
        await waiting


async def test_who_waits_ends_with_draining_when_it_closes() -> None:
    gate = Gate()
    begun = asyncio.Event()

    async def wait() -> None:
        async with gate.waiting():
            begun.set()
            await asyncio.Event().wait()

    waiter = asyncio.create_task(wait())
    await begun.wait()
    gate.close()
    with pytest.raises(Draining):
        await waiter


async def test_a_cancelled_wait_stays_cancelled() -> None:
    gate = Gate()
    begun = asyncio.Event()

    async def wait() -> None:
        async with gate.waiting():
            begun.set()
            await asyncio.Event().wait()

    waiter = asyncio.create_task(wait())
    await begun.wait()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_errors_within_a_wait_go_on_as_they_are() -> None:
    gate = Gate()
    with pytest.raises(TimeoutError, match="its own"):
        async with gate.waiting():
            raise TimeoutError("its own")
