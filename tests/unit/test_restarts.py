"""A model whose worker has died is loaded again: when, how often, and what its callers see."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bear_grpc.errors import EngineStartFailed, LoadCooldown, ModelUnloaded, WorkerCrashed
from bear_grpc.models.cooldown import FIRST_S
from bear_grpc.models.restarts import LONGEST_PAUSE_S, MOST_DEATHS, MOST_FAILED_LOADS, pause_s
from bear_grpc.types import LoadOptions, ModelState, StateReason
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.lifecycle import FakeExecutor, World, outcome, use

RESTARTING = (ModelState.LOADING, StateReason.RESTARTING)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path, write_tiny_llama(tmp_path / "model.gguf"))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def die(world: World, executor: FakeExecutor) -> None:
    """The worker dies, and all pauses pass."""
    executor.crash()
    await settle()
    world.clock.advance(LONGEST_PAUSE_S)
    await settle()


def test_pauses_begin_with_none_and_double_up_to_a_limit():
    assert [pause_s(deaths) for deaths in range(6)] == [0, 0, 0.5, 1, 2, 4]
    assert pause_s(100) == LONGEST_PAUSE_S


async def test_a_model_whose_worker_dies_is_loaded_again_as_it_was(world):
    entry = await world.add("a", keep_alive_s=60.0)
    executor = await world.load("a", LoadOptions(context_length=64))
    executor.crash()
    assert (entry.state, entry.reason, entry.executor) == (*RESTARTING, executor)
    assert "signal 9" in entry.message
    assert entry.expires is None
    waiting = asyncio.ensure_future(use(world, "a"))
    await settle()
    assert not waiting.done()
    executor.finish()
    await waiting
    assert (entry.state, entry.reason, entry.message) == (ModelState.READY, None, "")
    assert (executor.restarts, executor.given_up, len(world.executors)) == (1, None, 1)
    assert entry.status().options.context_length == 64
    world.clock.advance(60.0)
    assert entry.state is ModelState.UNLOADING
    await world.unloaded("a")


async def test_the_second_death_in_a_row_is_followed_by_a_pause(world):
    await world.add("a")
    executor = await world.load("a")
    executor.crash()
    await settle()
    executor.finish()
    await settle()
    executor.crash()
    await settle()
    assert executor.restarts == 1
    world.clock.advance(0.5)
    await settle()
    assert executor.restarts == 2


async def test_deaths_without_a_finished_request_end_in_a_pause(world):
    entry = await world.add("a")
    executor = await world.load("a")
    for count in range(1, MOST_DEATHS):
        await die(world, executor)
        assert executor.restarts == count
        executor.finish()
        await settle()
    await die(world, executor)
    assert (entry.state, entry.reason) == (ModelState.FAILED, StateReason.CRASH_LOOP)
    assert isinstance(executor.given_up, WorkerCrashed)
    world.clock.advance(-LONGEST_PAUSE_S)
    with pytest.raises(LoadCooldown) as caught:
        await use(world, "a")
    assert caught.value.retry_after_s <= FIRST_S
    assert (await world.load("a")) is not executor


async def test_a_finished_request_between_deaths_is_a_new_beginning(world):
    entry = await world.add("a")
    executor = await world.load("a")
    for _ in range(3 * MOST_DEATHS):
        executor.deaths = 0
        await die(world, executor)
        executor.finish()
        await settle()
    assert entry.state is ModelState.READY


async def test_deaths_while_it_is_loaded_again_end_in_a_pause(world):
    entry = await world.add("a")
    executor = await world.load("a")
    executor.crash()
    await settle()
    waiting = asyncio.ensure_future(outcome(use(world, "a")))
    for _ in range(MOST_FAILED_LOADS):
        assert (entry.state, entry.reason) == RESTARTING
        executor.fail(EngineStartFailed("it ended"))
        await settle()
        world.clock.advance(LONGEST_PAUSE_S)
        await settle()
    assert executor.restarts == MOST_FAILED_LOADS
    assert (entry.state, entry.reason) == (ModelState.FAILED, StateReason.CRASH_LOOP)
    assert isinstance(await waiting, WorkerCrashed)
    assert isinstance(executor.given_up, WorkerCrashed)


@pytest.mark.parametrize("crashes", [1, 2], ids=["while it is loaded", "while it pauses"])
async def test_an_unload_ends_a_restart_and_its_waiters(world, crashes):
    entry = await world.add("a")
    executor = await world.load("a")
    for count in range(crashes):
        executor.crash()
        await settle()
        if count + 1 < crashes:
            executor.finish()
            await settle()
    waiting = asyncio.ensure_future(outcome(use(world, "a")))
    await settle()
    await world.manager.unload("a", 0.0)
    assert (entry.state, entry.executor) == (ModelState.AVAILABLE, None)
    assert isinstance(executor.given_up, ModelUnloaded)
    assert isinstance(await waiting, ModelUnloaded)


async def test_a_worker_that_dies_while_its_model_is_unloaded_is_not_started_again(world):
    entry = await world.add("a")
    executor = await world.load("a")
    executor.begin()
    unloading = asyncio.ensure_future(world.manager.unload("a", 60.0))
    await settle()
    executor.crash()
    await unloading
    assert (entry.state, executor.restarts) == (ModelState.AVAILABLE, 0)
    assert isinstance(executor.given_up, WorkerCrashed)
