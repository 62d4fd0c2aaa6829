"""Two tenants on one server, one over TCP, one over a unix socket; and requests more or less urgent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bear_grpc.executor.spawner import Spawner
from tests.helpers.rpc import Api, collect, eventually, read_until, serving

SLOTS = 2
LONG = {"max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
async def tenants(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, steady_file: Path
) -> AsyncIterator[tuple[Api, Api]]:
    """Stubs of the one and of the other; a model `steady` with two slots."""
    folder = tmp_path_factory.mktemp("tenants")
    listen = [f"unix:{folder}/s", "127.0.0.1:0"]
    async with serving(folder, spawner, listen=listen, allow_path=[steady_file.parent]) as (server, light):
        await light.register("steady", steady_file)
        await light.load("steady", max_sequences=SLOTS)
        async with Api(server.addresses[1]) as heavy:
            yield light, heavy


async def test_short_request_does_not_wait_for_another_tenants_long_ones(tenants: tuple[Api, Api]) -> None:
    light, heavy = tenants
    calls = [heavy.generate("steady", f"number {place}", **LONG) for place in range(6)]

    async def all_here() -> bool:
        status = await light.status("steady")
        return (status.running_count, status.waiting_count) == (SLOTS, 4)

    await eventually(all_here)
    before = (await light.status("steady")).counters.preemption_count
    answer = await light.once("steady", max_tokens=4, ignore_eos=True)
    assert answer.usage.completion_token_count == 4
    status = await light.status("steady")
    assert status.counters.preemption_count == before + 1
    assert status.running_count + status.waiting_count == 6
    for call in calls:
        call.cancel()
    await light.idle("steady")


async def test_urgent_request_is_the_next_of_its_tenant(tenants: tuple[Api, Api]) -> None:
    light, _ = tenants
    running = [light.generate("steady", f"running {place}", **LONG) for place in range(SLOTS)]
    for call in running:
        await read_until(call, "started")
    ends: list[str] = []

    async def rest_of(call: Any, priority: str) -> None:
        await collect(call)
        ends.append(priority)

    asks = []
    for priority in ("low", "normal", "high"):
        call = light.generate("steady", priority, max_tokens=2, priority=priority, queue_progress=True)
        await read_until(call, "queued")  # the engine has it
        asks.append(asyncio.ensure_future(rest_of(call, priority)))
    running[0].cancel()
    await asyncio.gather(*asks)
    assert ends == ["high", "normal", "low"]
    running[1].cancel()
    await light.idle("steady")
