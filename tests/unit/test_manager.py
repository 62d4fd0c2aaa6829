"""The manager: joined loads, pauses after failures, files that are fetched first."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from bear_grpc.errors import (
    BearError,
    Draining,
    EngineStartFailed,
    InvalidField,
    LoadConflict,
    LoadCooldown,
    ModelAlreadyLoaded,
    ModelFileInvalid,
    ModelFileNotFound,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnloaded,
)
from bear_grpc.models.cooldown import FIRST_S, LONGEST_S
from bear_grpc.types import LoadOptions, ModelState, StateReason
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.lifecycle import SOURCE, FakeProcess, World, outcome, use

READY, AVAILABLE, UNLOADING = ModelState.READY, ModelState.AVAILABLE, ModelState.UNLOADING


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
def world(tmp_path: Path, model: Path) -> World:
    return World(tmp_path, model)


async def fail(world: World, name: str, count: int, error: Exception | None = None) -> BearError | None:
    """Load number `count` of a model, which fails."""
    loading = asyncio.ensure_future(outcome(world.manager.load(name)))
    (await world.started(name, count)).fail(error or EngineStartFailed("no"))
    return await loading


# ---- loads ------------------------------------------------------------------------------------------


async def test_a_load_is_shared_by_all_who_need_the_model(world):
    entry = await world.add("a")
    calls = [asyncio.ensure_future(world.manager.load("a")) for _ in range(2)]
    calls += [asyncio.ensure_future(use(world, "a")) for _ in range(3)]
    (await world.started("a")).finish()
    await asyncio.gather(*calls)
    assert (len(world.executors), entry.state) == (1, READY)


async def test_a_load_under_way_refuses_other_options_but_takes_another_keep_alive(world):
    entry = await world.add("a")
    first = asyncio.ensure_future(world.manager.load("a", LoadOptions(context_length=64)))
    executor = await world.started("a")
    with pytest.raises(LoadConflict):
        await world.manager.load("a", LoadOptions(context_length=128))
    second = asyncio.ensure_future(world.manager.load("a", LoadOptions(keep_alive_s=5.0, pinned=True)))
    await asyncio.sleep(0)
    executor.finish()
    await asyncio.gather(first, second)
    assert (entry.keep_alive_s, entry.pinned) == (5.0, True)
    world.clock.advance(5.0)
    assert entry.state is UNLOADING
    await world.unloaded("a")


async def test_a_loaded_model_takes_another_keep_alive_and_pinned_and_no_other_options(world):
    entry = await world.add("a")
    await world.load("a")
    with world.shelf.feed.watch() as watcher:
        _, seconds = await world.manager.load("a", LoadOptions(keep_alive_s=60.0, pinned=True, threads=1))
        assert (seconds, watcher.backlog) == (0.0, 1)
    assert entry.expires is not None
    effective = entry.status().options
    assert (effective.keep_alive_s, effective.pinned, effective.context_length) == (60.0, True, 512)
    with pytest.raises(ModelAlreadyLoaded) as caught:
        await world.manager.load("a", LoadOptions(keep_alive_s=1.0, context_length=7))
    assert caught.value.metadata["differing"] == "context_length"
    assert entry.keep_alive_s == 60.0
    await world.manager.load("a", LoadOptions(keep_alive_s=-1.0, pinned=False))
    assert (entry.expires, entry.pinned) == (None, False)


async def test_a_worker_is_not_told_how_long_the_model_is_kept(world):
    await world.add("a", keep_alive_s=9.0, pinned=True, context_length=64)
    executor = await world.load("a")
    assert executor.options == LoadOptions(context_length=64)


async def test_a_worker_is_told_the_chat_template_of_the_catalog(world):
    entry = await world.add("a")
    assert (await world.load("a")).chat_template is None
    await world.manager.unload("a", 0.0)
    entry.chat_template = "{{ messages }}"
    assert (await world.load("a")).chat_template == "{{ messages }}"


async def test_an_unload_that_does_not_give_everything_back_says_so(world, caplog):
    await world.add("a")
    executor = await world.load("a", memory=100)
    executor.left = (left := FakeProcess(77, 30),)
    assert (await world.manager.unload("a", 0.0)).released_bytes == 70
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "process 77 does not end: 30 bytes" in line
    entry = world.shelf.get("a")
    status = entry.status()
    assert (status.state, status.pid, status.process_bytes) == (AVAILABLE, 77, 30)
    assert "process 77" in status.message
    # It counts beside the worker of another load, until the kernel is done with it.
    await world.load("a", memory=100)
    assert entry.status(process_bytes=100).process_bytes == 130
    left.has_ended = True
    assert entry.status(process_bytes=100).process_bytes == 100
    assert (await world.manager.unload("a", 0.0)).released_bytes == 100
    assert entry.status().pid == 0


async def test_an_unload_that_gives_everything_back_warns_of_nothing(world, caplog):
    await world.add("a")
    (await world.load("a")).memory_bytes = 100
    assert (await world.manager.unload("a", 0.0)).released_bytes == 100
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_an_unload_ends_a_load_and_its_waiters(world):
    entry = await world.add("a")
    waiting = [asyncio.ensure_future(outcome(call)) for call in (world.manager.load("a"), use(world, "a"))]
    await world.started("a")
    assert await world.manager.unload("a", 0.0)
    assert [type(error) for error in await asyncio.gather(*waiting)] == [ModelUnloaded] * 2
    assert (entry.state, entry.executor) == (AVAILABLE, None)


async def test_a_model_that_may_not_be_loaded_is_refused(world):
    await world.add("a")
    with pytest.raises(ModelNotLoaded):
        async with world.request("a", load_if_needed=False):
            pass
    await world.load("a")
    async with world.request("a", load_if_needed=False):
        pass


# ---- pauses after failures --------------------------------------------------------------------------


async def test_requests_wait_out_a_pause_that_doubles_up_to_a_limit(world):
    entry = await world.add("a")
    pauses = []
    for count in range(1, 8):
        await fail(world, "a", count)
        assert (entry.state, entry.reason) == (ModelState.FAILED, StateReason.LOAD_FAILED)
        with pytest.raises(LoadCooldown) as caught:
            await use(world, "a")
        pauses.append(caught.value.retry_after_s)
        assert entry.reason is StateReason.COOLDOWN
        assert "no" in caught.value.metadata["cause"]
    assert pauses == [FIRST_S, 20, 40, 80, 160, LONGEST_S, LONGEST_S]


async def test_a_request_after_the_pause_loads(world):
    entry = await world.add("a")
    await fail(world, "a", 1)
    world.clock.advance(FIRST_S - 1)
    with pytest.raises(LoadCooldown) as caught:
        await use(world, "a")
    assert caught.value.retry_after_s == pytest.approx(1.0)
    world.clock.advance(1)
    using = asyncio.ensure_future(use(world, "a"))
    (await world.started("a", 2)).finish()
    await using
    assert (entry.state, entry.reason) == (READY, None)


async def test_a_load_that_is_asked_for_is_tried_within_the_pause_and_its_success_ends_it(world):
    await world.add("a")
    await fail(world, "a", 1)
    await fail(world, "a", 2)
    await world.load("a")
    await world.manager.unload("a", 0.0)
    await fail(world, "a", 4)
    with pytest.raises(LoadCooldown) as caught:
        await use(world, "a")
    assert caught.value.retry_after_s == FIRST_S


@pytest.mark.parametrize(
    "error", [ModelFileInvalid("m", "is no model"), InvalidField("options.threads", "no")]
)
async def test_what_time_does_not_mend_begins_no_pause(world, error):
    await world.add("a")
    assert await fail(world, "a", 1, error) is error
    using = asyncio.ensure_future(use(world, "a"))
    (await world.started("a", 2)).finish()
    await using


# ---- files that are not here ------------------------------------------------------------------------


async def test_a_model_without_a_file_is_refused_where_nothing_can_fetch_it(world):
    world.shelf.announce("owner/repo:Q4", SOURCE)
    for call in (world.manager.load("owner/repo:Q4"), use(world, "owner/repo:Q4")):
        with pytest.raises(ModelFileNotFound, match="`bear pull owner/repo:Q4` fetches it"):
            await call
    with pytest.raises(ModelNotFound):
        await use(world, "owner/other:Q4")


async def test_a_model_that_is_needed_is_fetched_first(tmp_path, model):
    asked: list[str] = []

    async def ensure(name: str) -> None:
        asked.append(name)
        await world.add("owner/repo:Q4")

    world = World(tmp_path, model, ensure_file=ensure)
    using = asyncio.ensure_future(use(world, "hf.co/owner/repo:q4"))
    (await world.started("owner/repo:Q4")).finish()
    await using
    await use(world, "owner/repo:Q4")
    assert asked == ["hf.co/owner/repo:q4"]
    with pytest.raises(ModelNotFound):
        await use(world, "tiny")  # no reference


async def test_what_a_download_fails_with_goes_to_who_needs_the_model(tmp_path, model):
    failure = ModelFileNotFound("not allowed")

    async def ensure(name: str) -> None:
        raise failure

    world = World(tmp_path, model, ensure_file=ensure)
    assert await outcome(use(world, "owner/repo:Q4")) is failure
    world.shelf.announce("owner/repo:Q4", SOURCE)
    assert await outcome(world.manager.load("owner/repo:Q4")) is failure
    with pytest.raises(ModelNotLoaded):
        async with world.request("owner/repo:Q4", load_if_needed=False):
            pass


async def test_a_download_whose_file_is_gone_can_be_had_again(world, tmp_path):
    await world.add("owner/repo:Q4")
    entry = world.shelf.get("owner/repo:Q4")
    entry.path = tmp_path / "gone.gguf"
    with pytest.raises(ModelFileNotFound):
        await world.manager.load("owner/repo:Q4")
    assert (entry.state, world.shelf.find("owner/repo:Q4")) == (ModelState.ABSENT, None)


# ---- the end ----------------------------------------------------------------------------------------


async def test_close_ends_loads_models_and_timers(world):
    entries = [await world.add(name, keep_alive_s=60.0) for name in "ab"]
    await world.load("a")
    loading = asyncio.ensure_future(outcome(world.manager.load("b")))
    await world.started("b")
    await world.manager.close()
    assert isinstance(await loading, Draining)
    assert [entry.state for entry in entries] == [AVAILABLE, AVAILABLE]
    world.clock.advance(1000.0)
