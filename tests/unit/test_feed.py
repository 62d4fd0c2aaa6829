"""The feed: every change in order, or the latest of each model for a reader that does not keep up."""

from __future__ import annotations

import asyncio
import datetime
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.models.entry import ModelStatus
from bear_grpc.models.feed import MAX_QUEUED, StatusFeed, Watcher
from bear_grpc.types import LoadStage, ModelState, PullProgress, PullStage, StateReason

MOMENT = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_moments = itertools.count()


def status(name: str, state: ModelState = ModelState.AVAILABLE, **changes: object) -> ModelStatus:
    """A new stay in a state."""
    since = MOMENT + datetime.timedelta(seconds=next(_moments))
    return ModelStatus(name, state, **{"reason": None, "message": "", "since": since, **changes})


def step(before: ModelStatus, **changes: object) -> ModelStatus:
    """The same stay, further on."""
    values = {field: getattr(before, field) for field in ModelStatus.__dataclass_fields__}
    return ModelStatus(**{**values, **changes})


async def unread(watcher: Watcher) -> list[ModelStatus]:
    """All that is queued."""
    watcher.close()
    return [status async for status in watcher]


async def test_a_watcher_gets_the_snapshot_then_every_change_in_order():
    feed = StatusFeed()
    feed.publish(status("early"))
    first = [status("a"), status("b")]
    changes = [status(name) for name in "abab"]
    with feed.watch(first) as watcher:
        for change in changes:
            feed.publish(change)
        assert await unread(watcher) == first + changes
    feed.publish(status("late"))
    assert watcher.backlog == 0


async def test_a_reader_that_waits_is_woken():
    feed = StatusFeed()
    with feed.watch() as watcher:
        reader = asyncio.ensure_future(anext(aiter(watcher)))
        await asyncio.sleep(0)
        change = status("a")
        feed.publish(change)
        assert await reader is change


async def test_steps_of_progress_that_nobody_has_read_replace_each_other():
    loading = [status(name, ModelState.LOADING, stage=LoadStage.STARTING) for name in "ab"]
    last = [step(loading[place % 2], stage=LoadStage.WEIGHTS, fraction=place / 100) for place in range(100)]
    ready = status("a", ModelState.READY)
    watcher = Watcher()
    for change in [*loading, *last, ready]:
        watcher.put(change)
    assert await unread(watcher) == [*last[-2:], ready]


async def test_progress_of_a_download_counts_as_progress_and_its_failure_does_not():
    absent = status("a", ModelState.ABSENT)
    steps = [step(absent, pull=PullProgress(PullStage.DOWNLOADING, done, 100)) for done in range(100)]
    failed = step(absent, reason=StateReason.PULL_FAILED, message="no")
    again = step(absent, pull=PullProgress(PullStage.QUEUED))
    watcher = Watcher()
    for change in [absent, *steps, failed, again]:
        watcher.put(change)
    assert await unread(watcher) == [steps[-1], failed, again]


async def test_progress_that_has_been_read_comes_again():
    loading = status("a", ModelState.LOADING)
    watcher = Watcher()
    reader = aiter(watcher)
    for fraction in (0.1, 0.2, 0.3):
        further = step(loading, fraction=fraction)
        watcher.put(further)
        assert await anext(reader) is further


async def test_a_late_reader_gets_the_latest_of_each_model_and_then_every_change_again():
    watcher = Watcher()
    changes = [status(f"model-{place % 7}") for place in range(10 * MAX_QUEUED)]
    for change in changes:
        watcher.put(change)
    assert watcher.backlog == 7
    reader = aiter(watcher)
    assert [await anext(reader) for _ in range(7)] == changes[-7:]
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)  # it has caught up
    both = [status("model-0"), status("model-0")]
    for change in both:
        watcher.put(change)
    assert [await waiting, *(await unread(watcher))] == both


async def test_the_last_word_of_a_forgotten_model_reaches_a_late_reader():
    watcher = Watcher()
    last = status("gone", ModelState.ABSENT, is_known=False)
    watcher.put(step(last, is_known=True))
    watcher.put(last)
    for _ in range(2 * MAX_QUEUED):
        watcher.put(status("busy"))
    assert (await unread(watcher))[0] is last


@given(names=st.lists(st.sampled_from("abcd"), max_size=3 * MAX_QUEUED, min_size=MAX_QUEUED))
def test_the_queue_is_bounded_and_ends_with_the_latest_of_each_model(names):
    watcher = Watcher()
    latest: dict[str, ModelStatus] = {}
    for name in names:
        latest[name] = status(name)
        watcher.put(latest[name])
        assert watcher.backlog <= MAX_QUEUED
    found = asyncio.run(unread(watcher))
    assert {change.name: change for change in found} == latest
    assert [change.since for change in found] == sorted(change.since for change in found)


def test_many_models_take_one_place_each():
    watcher = Watcher(status(f"{place}") for place in range(3 * MAX_QUEUED))
    for place in range(3 * MAX_QUEUED):
        watcher.put(status(f"{place}"))
    assert watcher.backlog == 3 * MAX_QUEUED


@pytest.mark.parametrize("before", [True, False])
async def test_a_closed_feed_ends_watchers_after_what_is_queued(before):
    feed = StatusFeed()
    first = status("a")
    if not before:
        feed.close()
    with feed.watch([first]) as watcher:
        feed.close()
        assert [change async for change in watcher] == [first]


def test_listeners_hear_every_change():
    feed = StatusFeed()
    heard: list[ModelStatus] = []
    feed.listen(heard.append)
    changes = [status("a") for _ in range(2 * MAX_QUEUED)]
    for change in changes:
        feed.publish(change)
    assert heard == changes
