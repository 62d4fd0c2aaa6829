"""Which models make room for another one, and that none that is needed does."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from bear_grpc.errors import InsufficientMemory, ModelUnloaded
from bear_grpc.models.entry import ModelEntry
from bear_grpc.models.eviction import Need, Room
from bear_grpc.types import LoadOptions, ModelState
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.lifecycle import Host, World, outcome, use

READY, AVAILABLE, UNLOADING = ModelState.READY, ModelState.AVAILABLE, ModelState.UNLOADING


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "model.gguf")


def crowded(tmp_path: Path, model: Path, units: int) -> World:
    """A world with room for so many models."""
    host = Host(units)
    host.world = World(tmp_path, model, plan=host.plan)
    return host.world


async def test_the_idle_model_used_longest_ago_makes_room(tmp_path, model, caplog):
    world = crowded(tmp_path, model, 2)
    entries = {name: await world.add(name) for name in "abc"}
    for name in "ab":
        await world.load(name, memory=1)
        world.clock.advance(1.0)
    await use(world, "a")
    with caplog.at_level(logging.INFO, "bear_grpc.models"):
        await world.load("c", memory=1)
    states = {name: entry.state for name, entry in entries.items()}
    assert states == {"a": READY, "b": AVAILABLE, "c": READY}
    assert "b is unloaded: c needs 1 bytes, 0 are free" in caplog.messages


async def test_neither_busy_nor_pinned_nor_waited_for_models_make_room(tmp_path, model):
    world = crowded(tmp_path, model, 2)
    entries = {name: await world.add(name) for name in "abc"}
    await world.load("a", LoadOptions(pinned=True), memory=1)
    await world.load("b", memory=1)
    async with world.request("b"):
        with pytest.raises(InsufficientMemory) as caught:
            await world.manager.load("c")
        assert caught.value.metadata == {"model": "c", "needed_bytes": "1", "free_bytes": "0"}
    assert [entries[name].state for name in "ab"] == [READY, READY]
    await world.load("c", memory=1)  # no pause after it
    assert [entries[name].state for name in "abc"] == [READY, AVAILABLE, READY]


async def test_two_loads_at_once_do_not_take_the_same_room(tmp_path, model):
    world = crowded(tmp_path, model, 1)
    for name in "ab":
        await world.add(name)
    first = asyncio.ensure_future(world.manager.load("a"))
    executor = await world.started("a")
    assert isinstance(await outcome(world.manager.load("b")), InsufficientMemory)
    executor.finish(memory_bytes=1)
    await first
    await world.load("b", memory=1)  # now `a` can go


async def test_room_is_looked_for_by_one_load_at_a_time():
    """Else two plans that are made at once both find the same bytes free."""

    async def plan(entry: ModelEntry, options: LoadOptions) -> Need:
        await asyncio.sleep(0)
        return Need(1, 1)

    room = Room(plan, longest_idle=lambda: None, evict=lambda entry, why: asyncio.sleep(0))
    release = asyncio.Event()

    async def load(name: str) -> None:
        async with room.kept_for(ModelEntry(name, Path(name), False)):
            await release.wait()

    loads = [asyncio.ensure_future(outcome(load(name))) for name in "ab"]
    await asyncio.wait(loads, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    release.set()
    first, second = await asyncio.gather(*loads)
    assert first is None
    assert isinstance(second, InsufficientMemory)


async def test_a_model_whose_load_was_waited_for_does_not_make_room_before_its_first_use(tmp_path, model):
    """At the moment at which it is ready, the request has not gone on yet."""
    host = Host(1)
    host.world = world = World(tmp_path, model, plan=host.plan)
    entry = await world.add("a")
    await world.add("b")
    using = asyncio.ensure_future(outcome(use(world, "a")))
    executor = await world.started("a")
    host.gate.clear()
    loading = asyncio.ensure_future(outcome(world.manager.load("b")))
    await host.waiting.wait()
    executor.finish(memory_bytes=1)
    host.gate.set()
    assert isinstance(await loading, InsufficientMemory)
    assert (await using, entry.state) == (None, READY)


async def test_a_load_that_is_given_up_while_room_is_made_leaves_the_room_for_others(tmp_path, model):
    world = crowded(tmp_path, model, 1)
    entries = {name: await world.add(name) for name in "ab"}
    await world.load("a", memory=1)
    with world.shelf.feed.watch() as watcher:
        loading = asyncio.ensure_future(outcome(world.manager.load("b")))
        async for status in watcher:
            if status.state is UNLOADING:
                break
    await world.manager.unload("b", 0.0)
    assert isinstance(await loading, ModelUnloaded)
    await world.load("b", memory=1)
    assert (entries["a"].state, entries["b"].state) == (AVAILABLE, READY)
