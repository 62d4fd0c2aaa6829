"""How long models are kept: their own time, a request's, a load's; who wins over the timer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bear_grpc.errors import LoadConflict, ModelUnloaded
from bear_grpc.models.keeping import HOLD_S, RECHECK_S
from bear_grpc.types import LoadOptions, ModelState
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.lifecycle import World, use

READY, AVAILABLE, UNLOADING = ModelState.READY, ModelState.AVAILABLE, ModelState.UNLOADING


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
def world(tmp_path: Path, model: Path) -> World:
    return World(tmp_path, model)


async def test_an_idle_model_goes_after_its_time_and_is_loaded_again_when_needed(world):
    entry = await world.add("a", keep_alive_s=60.0)
    await world.load("a")
    world.clock.advance(59.0)
    await use(world, "a")
    assert entry.expires is not None
    world.clock.advance(59.0)
    assert entry.state is READY
    world.clock.advance(1.0)
    assert (entry.state, entry.expires) == (UNLOADING, None)
    using = asyncio.ensure_future(use(world, "a"))  # while the worker is being ended
    (await world.started("a", 2)).finish()
    await using
    assert entry.state is READY


async def test_a_load_that_is_asked_for_waits_for_an_unload_that_nobody_asked_for(world):
    entry = await world.add("a", keep_alive_s=1.0)
    await world.load("a")
    world.clock.advance(1.0)
    assert entry.state is UNLOADING
    await world.load("a")
    assert entry.state is READY


async def test_a_request_is_told_that_somebody_has_the_model_unloaded(world):
    await world.add("a")
    executor = await world.load("a")
    executor.begin()
    unloading = asyncio.ensure_future(world.manager.unload("a", 30.0))
    await asyncio.sleep(0)
    with pytest.raises(ModelUnloaded):
        await use(world, "a")
    with pytest.raises(LoadConflict):
        await world.manager.load("a")
    executor.end()
    assert (await unloading).cancelled == 0


async def test_a_running_request_keeps_the_model_however_long_it_takes(world):
    entry = await world.add("a", keep_alive_s=1.0)
    await world.load("a")
    world.clock.advance(0.5)
    async with world.request("a"):
        assert entry.expires is None
        world.clock.advance(1000.0)
        assert entry.state is READY
    world.clock.advance(1.0)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_a_request_at_the_last_moment_wins_over_the_timer(world):
    entry = await world.add("a", keep_alive_s=1.0)
    await world.load("a")
    world.clock.advance(1.0 - 1e-9)
    async with world.request("a"):
        world.clock.advance(1e-9)
        assert entry.state is READY


@pytest.mark.parametrize(
    ("own_s", "asked_s", "kept_s"),
    [
        (60.0, None, 60.0),
        (60.0, 0.0, 0.0),
        (60.0, -1.0, None),
        (-1.0, None, None),
        (-1.0, 5.0, 5.0),
        (0.0, None, 0.0),
    ],
)
async def test_a_requests_own_keep_alive_goes_before_the_models(world, own_s, asked_s, kept_s):
    entry = await world.add("a", keep_alive_s=own_s)
    await world.load("a")
    await use(world, "a", asked_s)
    if kept_s is None:
        world.clock.advance(1e12)
        assert (entry.state, entry.expires) == (READY, None)
        return
    if kept_s > 0:
        world.clock.advance(kept_s - 0.001)
        assert entry.state is READY
    world.clock.advance(0.001)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_the_last_use_that_ends_decides(world):
    entry = await world.add("a", keep_alive_s=60.0)
    await world.load("a")
    async with world.request("a"):
        await use(world, "a", 0.0)
        world.clock.advance(1.0)
        assert entry.state is READY
    world.clock.advance(59.0)
    assert entry.state is READY
    world.clock.advance(1.0)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_a_model_with_keep_alive_0_waits_for_its_first_use(world):
    entry = await world.add("a", keep_alive_s=0.0)
    await world.load("a")
    world.clock.advance(1000.0)
    assert entry.state is READY
    await use(world, "a")
    world.clock.advance(0.0)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_the_servers_keep_alive_is_for_models_without_one(tmp_path, model):
    world = World(tmp_path, model, keep_alive_s=10.0)
    entry, other = await world.add("a"), await world.add("b", keep_alive_s=-1.0)
    await world.load("a")
    await world.load("b")
    world.clock.advance(10.0)
    assert (entry.state, other.state) == (UNLOADING, READY)
    await world.unloaded("a")


async def test_an_options_keep_alive_is_of_one_load_only(world):
    entry = await world.add("a", keep_alive_s=60.0)
    await world.load("a", LoadOptions(keep_alive_s=-1.0, pinned=True))
    await world.manager.unload("a", 0.0)
    await world.load("a")
    assert (entry.keep_alive_s, entry.pinned) == (60.0, False)


@pytest.mark.parametrize("keep_alive_s", [1e9, 1e300, float("inf"), float("nan")])
async def test_a_time_beyond_every_calendar_is_for_ever(world, keep_alive_s):
    entry = await world.add("a", keep_alive_s=keep_alive_s)
    await world.load("a")
    await use(world, "a")
    assert (entry.state, entry.expires) == (READY, None)


async def test_an_executor_that_is_taken_for_a_call_is_in_use_for_a_while(world):
    entry = await world.add("a", keep_alive_s=0.0)
    await world.load("a")
    await world.manager.executor("a")
    world.clock.advance(HOLD_S - 0.001)
    assert entry.state is READY
    world.clock.advance(0.001)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_a_call_after_a_request_gives_the_model_its_own_time_again(world):
    entry = await world.add("a", keep_alive_s=60.0)
    await world.load("a")
    await use(world, "a", -1.0)
    await world.manager.executor("a")
    world.clock.advance(HOLD_S)
    assert entry.expires is not None
    world.clock.advance(60.0)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_a_request_that_ends_while_its_model_is_held_decides_how_long_that_is_kept(world):
    """One that watches the load takes the executor first, and runs then."""
    entry = await world.add("a")
    await world.load("a")
    await world.manager.executor("a", hold_s=1.0)
    await use(world, "a", 0.0)
    assert entry.state is READY
    world.clock.advance(1.0)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_what_still_runs_when_the_time_is_over_is_waited_for(world):
    """A cancelled sequence is on its way out after its request has ended."""
    entry = await world.add("a", keep_alive_s=0.0)
    executor = await world.load("a")
    async with world.request("a"):
        executor.begin()
    world.clock.advance(10 * RECHECK_S)
    assert entry.state is READY
    executor.end()
    world.clock.advance(RECHECK_S)
    assert entry.state is UNLOADING
    await world.unloaded("a")
