"""A file under way: what is written down of it, and what that is good for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.store.blobs import Blobs
from bear_grpc.store.hashing import hash_file
from bear_grpc.store.listing import HubFile
from bear_grpc.store.partial import Ended, Partial
from bear_grpc.store.state import (
    MAX_SEGMENT_BYTES,
    MIN_SEGMENT_BYTES,
    State,
    read_state,
    segment_bytes_of,
)
from tests.helpers.pulls import REPO, SEGMENT, Background, content, sha256_of

DATA = content(3 * SEGMENT + 1000)
HUB_FILE = HubFile("m.gguf", sha256_of(DATA), len(DATA))


def nothing() -> None:
    """Nobody stops it."""


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path)


@contextmanager
def opened(blobs: Blobs, file: HubFile = HUB_FILE) -> Iterator[Partial]:
    partial = Partial(blobs, REPO, file)
    try:
        yield partial
    finally:
        partial.close()


def fill(partial: Partial, *indices: int) -> None:
    for index in indices:
        start, stop = partial.extent(index)
        partial.append(index, [DATA[start:stop]])


def state_of(blobs: Blobs) -> State:
    state = read_state(blobs, HUB_FILE.sha256)
    assert state is not None
    return state


def spoil_state(blobs: Blobs, **changes: object) -> None:
    raw = msgspec.json.decode(blobs.state(HUB_FILE.sha256).read_bytes())
    blobs.state(HUB_FILE.sha256).write_bytes(msgspec.json.encode({**raw, **changes}))


def test_file_is_as_long_as_it_will_be_and_takes_no_room(blobs):
    size = 2**40
    with opened(blobs, HubFile("large.gguf", "a" * 64, size)) as partial:
        stat = blobs.part("a" * 64).stat()
        assert stat.st_size == size and stat.st_blocks * 512 < 2**20
        assert partial.segment_bytes == MAX_SEGMENT_BYTES


@given(st.integers(1, 2**42))
def test_segments_are_a_power_of_two_within_limits(size):
    segment = segment_bytes_of(size)
    assert MIN_SEGMENT_BYTES <= segment <= MAX_SEGMENT_BYTES
    assert segment & (segment - 1) == 0
    assert segment == MIN_SEGMENT_BYTES or size // segment >= 32


def test_finished_segments_are_there_after_the_process_has_died(blobs):
    partial = Partial(blobs, REPO, HUB_FILE)
    fill(partial, 2, 0)
    partial.append(1, [DATA[SEGMENT : SEGMENT + 10]])
    # Nobody closes it.
    with opened(blobs) as again:
        assert again.missing() == [1, 3]
        assert again.extent(1)[0] == SEGMENT
        fill(again, 1, 3)
        assert hash_file(again.handle, len(DATA), again.wait_beyond) == HUB_FILE.sha256
    partial.close()


def test_begun_segments_go_on_where_they_stopped(blobs):
    with opened(blobs) as partial:
        partial.append(1, [DATA[SEGMENT : SEGMENT + 10], DATA[SEGMENT + 10 : SEGMENT + 25]])
    with opened(blobs) as again:
        assert again.extent(1) == (SEGMENT + 25, 2 * SEGMENT)
        assert again.present_bytes == 25 == state_of(blobs).present_bytes
        fill(again, 0, 1, 2, 3)
        assert again.drop_changed(nothing) == 0
        assert hash_file(again.handle, len(DATA), again.wait_beyond) == HUB_FILE.sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"size_bytes": len(DATA) + 1},
        {"segment_bytes": 0},
        {"segment_bytes": 1},
        {"segments": [{"index": 4, "count": 1, "crc32": 0}]},
        {"segments": [{"index": -1, "count": 1, "crc32": 0}]},
        {"segments": [{"index": 3, "count": 1001, "crc32": 0}]},
        {"segments": [{"index": 0, "count": -1, "crc32": 0}]},
        {"segments": [{"index": 0, "count": 1, "crc32": 0}] * 2},
        {"segments": "many"},
        {"more": 1},
    ],
)
def test_state_that_does_not_fit_is_told_and_nothing_is_kept(blobs, caplog, changes):
    with opened(blobs) as partial:
        fill(partial, 0)
    spoil_state(blobs, **changes)
    with opened(blobs) as again:
        assert again.present_bytes == 0
    assert caplog.records


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_state_without_its_file_is_worth_nothing(blobs, change):
    with opened(blobs) as partial:
        fill(partial, 0)
    part = blobs.part(HUB_FILE.sha256)
    part.unlink() if change == "gone" else part.write_bytes(DATA[:SEGMENT])
    with opened(blobs) as again:
        assert again.present_bytes == 0


def test_file_without_state_begins_anew(blobs):
    blobs.under_way.mkdir()
    blobs.part(HUB_FILE.sha256).write_bytes(DATA)
    with opened(blobs) as partial:
        assert partial.present_bytes == 0
        assert blobs.part(HUB_FILE.sha256).read_bytes() == bytes(len(DATA))


def test_file_that_was_about_to_become_a_blob_can_be_written_again(blobs):
    with opened(blobs) as partial:
        fill(partial, 0)
    blobs.part(HUB_FILE.sha256).chmod(0o444)
    with opened(blobs) as again:
        fill(again, 1)


def test_segment_that_changed_on_the_disk_is_found(blobs):
    with opened(blobs) as partial:
        fill(partial, 0, 1, 2, 3)
        with blobs.part(HUB_FILE.sha256).open("r+b") as file:
            file.seek(2 * SEGMENT + 5)
            file.write(bytes([DATA[2 * SEGMENT + 5] ^ 1]))
        assert partial.drop_changed(nothing) == 1
        assert partial.missing() == [2]
        assert partial.wait_beyond(0) == 2 * SEGMENT
        fill(partial, 2)
        assert partial.drop_changed(nothing) == 0


def test_only_segments_of_an_earlier_run_are_dropped_as_such(blobs):
    with opened(blobs) as partial:
        fill(partial, 0)
        partial.append(1, [DATA[SEGMENT : SEGMENT + 10]])
    with opened(blobs) as again:
        fill(again, 1, 2, 3)
        assert again.drop_kept(nothing) == 2
        assert again.missing() == [0, 1]
        fill(again, 0, 1)
        assert again.drop_kept(nothing) == 0
    assert [segment.index for segment in state_of(blobs).segments] == [0, 1, 2, 3]


def test_comparing_can_be_stopped(blobs):
    def stop() -> None:
        raise Ended

    with opened(blobs) as partial:
        fill(partial, 0)
        with pytest.raises(Ended):
            partial.drop_changed(stop)


@given(st.permutations(range(4)))
def test_frontier_is_the_end_of_what_is_there_without_a_gap(tmp_path_factory, order):
    with opened(Blobs(tmp_path_factory.mktemp("frontier"))) as partial:
        partial.end()  # asked for more than there is, it must not wait
        done: set[int] = set()
        for index in order:
            fill(partial, index)
            done.add(index)
            expected = 0
            while expected in done:
                expected += 1
            if expected:
                assert partial.wait_beyond(0) == min(expected * SEGMENT, len(DATA))
            else:
                with pytest.raises(Ended):
                    partial.wait_beyond(0)


def test_hash_follows_bytes_as_they_come(blobs):
    hashed = threading.Event()

    def available(position: int) -> int:
        if position >= SEGMENT:
            hashed.set()
        return partial.wait_beyond(position)

    with opened(blobs) as partial:
        digest = Background(lambda: hash_file(partial.handle, len(DATA), available))
        fill(partial, 0)
        assert hashed.wait(10)
        fill(partial, 3, 2, 1)
        assert digest.result() == HUB_FILE.sha256


def test_hash_of_a_file_that_ends_early_is_of_what_there_is(tmp_path):
    (tmp_path / "short").write_bytes(DATA[:100])
    with (tmp_path / "short").open("rb") as file:
        assert hash_file(file.fileno(), 200, lambda position: 200) == sha256_of(DATA[:100])
