"""Bytes from the hub into a partial file: ranges, cuts, retries, limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bear_grpc.errors import (
    HubAccessDenied,
    HubAnswerInvalid,
    HubRateLimited,
    HubUnreachable,
    ModelNotFound,
)
from bear_grpc.store.blobs import Blobs
from bear_grpc.store.download import Download
from bear_grpc.store.hub import Hub
from bear_grpc.store.listing import Resolved
from bear_grpc.store.partial import Partial
from bear_grpc.store.rate import RateLimiter
from bear_grpc.store.reference import parse_reference
from bear_grpc.store.transfer import CONNECTIONS, MAX_ATTEMPTS, Transfer, backoff_s
from bear_grpc.types import PullStage
from tests.helpers.hub import ALWAYS, StandInHub
from tests.helpers.pulls import FILE, NAME, REPO, SEGMENT, Background, Gate, content, sha256_of

DATA = content(10 * SEGMENT + 77)
SHA = sha256_of(DATA)


class Fetch:
    """One file of the stand-in, and its downloads into one place."""

    def __init__(self, folder: Path, hub: Hub, resolved: Resolved) -> None:
        self.blobs, self.hub, self.resolved = Blobs(folder), hub, resolved
        self.partial = self.opened()
        self.attempts: list[int] = []
        self.limiter = RateLimiter()

    def opened(self) -> Partial:
        return Partial(self.blobs, REPO, self.resolved.files[0])

    def begin(self) -> Download:
        transfer = Transfer(
            self.hub, self.resolved, self.resolved.files[0], self.partial, self.limiter, self.pause
        )
        return Download(transfer, self.partial)

    def pause(self, attempt: int) -> float:
        self.attempts.append(attempt)
        return 0.0

    def run(self, tick: Callable[[], None] = lambda: None) -> str:
        return self.begin().run(tick)

    def again(self) -> None:
        """As after a restart."""
        self.partial.close()
        self.partial = self.opened()


@pytest.fixture
def fetch(stand_in: StandInHub, hub: Hub, tmp_path: Path) -> Iterator[Fetch]:
    assert stand_in.add(REPO, FILE, DATA) == SHA
    reference = parse_reference(NAME)
    assert reference is not None
    fetch = Fetch(tmp_path, hub, hub.resolve(reference))
    yield fetch
    fetch.partial.close()


def ranges(stand_in: StandInHub) -> list[str | None]:
    return [request.range for request in stand_in.asked("storage")]


def test_every_byte_is_asked_for_once_in_segments(stand_in, fetch):
    assert fetch.run() == SHA
    assert fetch.blobs.part(SHA).read_bytes() == DATA
    bounds = [(n * SEGMENT, min((n + 1) * SEGMENT, len(DATA)) - 1) for n in range(11)]
    assert sorted(ranges(stand_in)) == sorted(f"bytes={first}-{last}" for first, last in bounds)


def test_first_segment_comes_alone_and_then_several_at_once(stand_in, fetch):
    gate = Gate(-1)  # nobody gets further than its first chunk
    fetch.limiter = gate.limiter
    together = threading.Event()

    def tick() -> None:
        if len(stand_in.asked("storage")) >= CONNECTIONS:
            together.set()
            gate.opened.set()

    assert fetch.run(tick) == SHA
    assert together.is_set()
    assert ranges(stand_in)[0] == f"bytes=0-{SEGMENT - 1}"


def test_server_without_ranges_is_read_in_one_stream(stand_in, fetch):
    stand_in.fail(FILE, ignore_range=True)
    assert fetch.run() == SHA
    assert ranges(stand_in) == [f"bytes=0-{SEGMENT - 1}", None]


def test_server_that_says_it_has_ranges_and_sends_none_is_read_in_one_stream(stand_in, fetch):
    stand_in.fail(FILE, ignore_range=True, storage_headers={"Accept-Ranges": "bytes"})
    assert fetch.run() == SHA
    assert ranges(stand_in).count(None) == 1


def test_stream_that_is_cut_begins_again_and_goes_on(stand_in, fetch):
    stand_in.fail(FILE, ignore_range=True, cut=(3 * SEGMENT + 5, 2))
    assert fetch.run() == SHA
    assert fetch.blobs.part(SHA).read_bytes() == DATA


def test_segments_that_are_there_are_not_asked_for_again(stand_in, fetch):
    for index in (0, 3, 10):
        start, stop = fetch.partial.extent(index)
        fetch.partial.append(index, [DATA[start:stop]])
    fetch.again()
    assert fetch.run() == SHA
    asked = {int(text.removeprefix("bytes=").split("-")[0]) // SEGMENT for text in ranges(stand_in)}
    assert asked == set(range(11)) - {0, 3, 10}


def test_segments_that_are_there_stay_when_the_server_has_no_ranges(stand_in, fetch):
    stand_in.fail(FILE, ignore_range=True)
    start, stop = fetch.partial.extent(4)
    fetch.partial.append(4, [DATA[start : start + 1000]])
    fetch.partial.append(4, [DATA[start + 1000 : stop]])
    fetch.partial.append(5, [DATA[stop : stop + 9]])
    fetch.again()
    assert fetch.run() == SHA
    assert fetch.partial.drop_changed(lambda: None) == 0


def test_file_that_is_all_there_is_only_hashed(stand_in, fetch):
    fetch.run()
    fetch.again()
    before = len(stand_in.requests)
    assert fetch.run() == SHA
    assert len(stand_in.requests) == before


def test_cut_segment_goes_on_where_it_stopped(stand_in, fetch):
    stand_in.fail(FILE, cut=(100_000, 1))
    assert fetch.run() == SHA
    assert f"bytes=100000-{SEGMENT - 1}" in ranges(stand_in)
    assert fetch.attempts == [1]


def test_many_cuts_are_no_matter_while_bytes_come(stand_in, fetch):
    stand_in.fail(FILE, cut=(50_000, 40))
    assert fetch.run() == SHA
    assert set(fetch.attempts) == {1} and len(fetch.attempts) > 4 * MAX_ATTEMPTS


@pytest.mark.parametrize("where", ["status", "storage_status"])
def test_errors_of_the_server_are_tried_again_for_a_while(stand_in, fetch, where):
    stand_in.fail(FILE, **{where: (503, MAX_ATTEMPTS)})
    assert fetch.run() == SHA
    assert sorted(fetch.attempts) == list(range(1, MAX_ATTEMPTS + 1))


def test_server_that_brings_nothing_is_given_up(stand_in, fetch):
    stand_in.fail(FILE, cut=(0, ALWAYS))
    with pytest.raises(HubUnreachable):
        fetch.run()
    assert max(fetch.attempts) == MAX_ATTEMPTS


def test_stream_that_brings_nothing_is_given_up(stand_in, fetch):
    stand_in.fail(FILE, ignore_range=True, cut=(SEGMENT, ALWAYS))
    with pytest.raises(HubUnreachable):
        fetch.run()
    assert fetch.partial.present_bytes == SEGMENT
    # The first attempt had brought something.
    assert fetch.attempts == list(range(1, MAX_ATTEMPTS + 1))


def test_pauses_grow_to_a_bound():
    assert [backoff_s(attempt) for attempt in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"gated": True}, HubAccessDenied),
        ({"status": (404, ALWAYS)}, ModelNotFound),
        ({"rate_limited": ALWAYS}, HubRateLimited),
        ({"wrong_length": 1}, HubAnswerInvalid),
        ({"shift_range": 1}, HubAnswerInvalid),
        ({"headers": {"X-Linked-Etag": '"' + "0" * 64 + '"'}}, HubAnswerInvalid),
    ],
)
def test_other_errors_end_it_at_once(stand_in, fetch, fault, error):
    stand_in.fail(FILE, **fault)
    with pytest.raises(error):
        fetch.run()
    assert fetch.attempts == []
    assert len(stand_in.asked("hub")) == 2  # the listing, and one attempt


def test_error_of_one_connection_ends_the_others_and_what_came_is_kept(stand_in, fetch):
    gate = Gate(-1)
    fetch.limiter = gate.limiter

    def tick() -> None:
        if len(stand_in.asked("storage")) >= CONNECTIONS:
            stand_in.fail(FILE, gated=True)
            gate.opened.set()

    with pytest.raises(HubAccessDenied):
        fetch.run(tick)
    kept = fetch.partial.present_bytes
    assert 0 < kept < len(DATA)
    stand_in.heal()
    fetch.again()
    assert fetch.partial.present_bytes == kept
    assert fetch.run() == SHA


def test_tick_that_raises_ends_it_and_what_came_is_kept(fetch):
    gate = Gate(3 * SEGMENT)
    fetch.limiter = gate.limiter

    class Enough(Exception):
        pass

    def tick() -> None:
        if gate.reached.is_set():
            raise Enough

    with pytest.raises(Enough):
        fetch.run(tick)
    kept = fetch.partial.present_bytes
    assert 0 < kept < len(DATA)
    fetch.again()
    assert fetch.partial.present_bytes == kept


def test_stages_follow_each_other(fetch):
    gate = Gate(3 * SEGMENT)
    fetch.limiter = gate.limiter
    download = fetch.begin()
    assert download.progress == (PullStage.DOWNLOADING, 0)
    work = Background(lambda: download.run(lambda: None))
    assert gate.reached.wait(10)
    stage, completed = download.progress
    assert stage is PullStage.DOWNLOADING and completed < len(DATA)
    gate.opened.set()
    assert work.result() == SHA
    assert download.progress[0] is PullStage.VERIFYING


def test_rate_is_of_all_together():
    waits: list[float] = []
    now = [100.0]
    limiter = RateLimiter(1000.0, clock=lambda: now[0], wait=lambda _, delay: waits.append(delay))
    for _ in range(4):
        limiter.take(500, threading.Event())
    now[0] += 60.0
    limiter.take(500, threading.Event())
    assert waits == [0.5, 1.0, 1.5, 2.0, 0.5]  # the minute without bytes is no credit


def test_rate_of_nothing_is_no_limit():
    limiter = RateLimiter(wait=lambda *_: pytest.fail("must not wait"))
    limiter.take(2**40, threading.Event())


def test_waiting_for_the_rate_ends_with_the_stop():
    stop = threading.Event()
    limiter = RateLimiter(1.0)
    work = Background(lambda: limiter.take(10**6, stop))
    stop.set()
    work.result()


def test_another_rate_holds_from_the_next_chunk_on():
    waits: list[float] = []
    limiter = RateLimiter(1000.0, clock=lambda: 0.0, wait=lambda _, delay: waits.append(delay))
    for rate in (1000.0, 100.0, 0.0, 1000.0):
        limiter.set_rate(rate)
        limiter.take(500, threading.Event())
    assert waits == [0.5, 5.0, 0.5]
