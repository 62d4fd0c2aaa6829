"""The bytes of a file: ranges, redirects, what is compared, and where the token goes."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from bear_grpc.errors import (
    HubAccessDenied,
    HubAnswerInvalid,
    HubRateLimited,
    HubUnreachable,
    InvalidField,
    ModelNotFound,
)
from bear_grpc.store.hub import MAX_REDIRECTS, Hub, HubFile
from bear_grpc.store.reference import Reference
from tests.helpers.hub import ALWAYS, EVERYTHING, SIGNATURE, StandInHub
from tests.store.conftest import TOKEN

REPO = "owner/repo"
NAME = "folder/a b#?%-Q8_0.gguf"
DATA = bytes(range(256)) * 1024


@pytest.fixture
def file(stand_in: StandInHub) -> HubFile:
    return HubFile(NAME, stand_in.add(REPO, NAME, DATA), len(DATA))


@pytest.fixture
def commit(stand_in: StandInHub, file: HubFile) -> str:
    return stand_in.commit(REPO)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, None), (0, 1), (0, len(DATA)), (5, None), (5, 6), (100_000, 200_000), (5, len(DATA) + 100)],
)
def test_bytes_of_a_range_come_from_where_they_were_asked_for(hub, file, commit, start, stop):
    with hub.stream(REPO, file, commit, start, stop) as body:
        assert (body.start, body.total, body.accepts_ranges) == (start, len(DATA), True)
        assert b"".join(body.chunks) == DATA[start:stop]


def test_server_that_ignores_ranges_begins_at_the_beginning(stand_in, hub, file, commit):
    stand_in.fail(NAME, ignore_range=True)
    with hub.stream(REPO, file, commit, 1000, 2000) as body:
        assert (body.start, body.total, body.accepts_ranges) == (0, len(DATA), False)
        assert b"".join(body.chunks) == DATA


@pytest.mark.parametrize("ignore_range", [False, True])
@pytest.mark.parametrize(("start", "count"), [(0, 4), (70_000, 130_000), (len(DATA) - 1, 1), (0, len(DATA))])
def test_read_gives_exactly_the_bytes_asked_for(stand_in, hub, file, commit, ignore_range, start, count):
    stand_in.fail(NAME, ignore_range=ignore_range)
    assert hub.read(REPO, file, commit, start, count) == DATA[start : start + count]


@pytest.mark.parametrize("ignore_range", [False, True])
@pytest.mark.parametrize("start", [len(DATA) - 1, len(DATA), len(DATA) + 1000])
def test_read_beyond_the_end_is_no_shorter_answer(stand_in, hub, file, commit, ignore_range, start):
    stand_in.fail(NAME, ignore_range=ignore_range)
    with pytest.raises(HubAnswerInvalid):
        hub.read(REPO, file, commit, start, 2)


def test_range_that_is_refused_is_an_invalid_answer(hub, file, commit):
    with pytest.raises(HubAnswerInvalid, match="range"), hub.stream(REPO, file, commit, len(DATA)):
        pass


@pytest.mark.parametrize(
    "knobs",
    [
        {"wrong_length": 1},
        {"wrong_length": -1},
        {"shift_range": 1},
        {"shift_range": -1},
        {"storage_headers": {"Content-Range": "bytes 10-18/100"}},
        {"storage_headers": {"Content-Range": "bytes 10-19/*"}},
        {"storage_headers": {"Content-Range": f"bytes 10-19/{'9' * 400}"}},
        {"storage_headers": {"Content-Range": ""}},
        {"storage_headers": {"Content-Length": "11"}},
        {"storage_headers": {"Content-Encoding": "gzip"}},
    ],
)
def test_answer_that_is_not_the_range_asked_for_is_invalid(stand_in, hub, file, commit, knobs):
    stand_in.fail(NAME, **knobs)
    with pytest.raises(HubAnswerInvalid), hub.stream(REPO, file, commit, 10, 20):
        pass


@pytest.mark.parametrize("length", ["-1", "ten", str(len(DATA) - 1), str(len(DATA) + 1)])
def test_whole_file_of_another_length_is_an_invalid_answer(stand_in, hub, file, commit, length):
    stand_in.fail(NAME, ignore_range=True, storage_headers={"Content-Length": length})
    with pytest.raises((HubAnswerInvalid, HubUnreachable)), hub.stream(REPO, file, commit):
        pass


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Linked-Etag": f'"{"ab" * 32}"'},
        {"X-Linked-Etag": f'W/"{"ab" * 32}"'},
        {"X-Repo-Commit": "ab" * 20},
        {"X-Repo-Commit": "../../evil"},
        {"Location": "ftp://127.0.0.1/x"},
        {"Location": "file:///etc/passwd"},
        {"Location": "http://[::1"},
    ],
)
def test_redirect_that_contradicts_what_is_known_is_invalid(stand_in, hub, file, commit, headers):
    stand_in.fail(NAME, headers=headers)
    with pytest.raises(HubAnswerInvalid), hub.stream(REPO, file, commit):
        pass
    assert stand_in.asked("storage") == []


@pytest.mark.parametrize("etag", ["../../../../evil", '"abc"', "", "AB" * 32])
def test_etag_that_is_no_checksum_means_nothing(stand_in, hub, file, commit, etag):
    stand_in.fail(NAME, headers={"X-Linked-Etag": etag})
    assert hub.read(REPO, file, commit, 0, 4) == DATA[:4]


@pytest.mark.parametrize(
    ("repo_id", "name", "revision"),
    [("owner/..", NAME, "main"), (REPO, "../a.gguf", "main"), (REPO, NAME, "../main"), (REPO, NAME, "")],
)
def test_nothing_malformed_becomes_an_address(stand_in, hub, repo_id, name, revision):
    with pytest.raises(InvalidField), hub.stream(repo_id, name, revision):
        pass
    assert stand_in.requests == []


def test_token_goes_to_the_hub_only(stand_in, hub_with_token, file, commit):
    stand_in.fail(NAME, detours=2)
    hub_with_token.read(REPO, file, commit, 0, 4)
    assert [request.has_authorization for request in stand_in.asked("hub")] == [True] * 3
    assert [request.has_authorization for request in stand_in.asked("storage")] == [False]
    assert TOKEN not in str([request.headers for request in stand_in.asked("storage")])


def test_cookies_are_not_kept(stand_in, hub, file, commit):
    stand_in.fail(NAME, headers={"Set-Cookie": "a=b"}, storage_headers={"Set-Cookie": "a=b"})
    stand_in.fail(REPO, listing_headers={"Set-Cookie": "a=b"})
    for _ in range(2):
        hub.resolve(Reference(REPO))
        hub.read(REPO, file, commit, 0, 4)
    assert not any("cookie" in request.headers for request in stand_in.requests)


def test_redirects_are_bounded(stand_in, hub, file, commit):
    stand_in.fail(NAME, detours=MAX_REDIRECTS - 1)
    assert hub.read(REPO, file, commit, 0, 4) == DATA[:4]
    stand_in.fail(NAME, detours=ALWAYS)
    stand_in.requests.clear()
    with pytest.raises(HubUnreachable, match="redirects"):
        hub.read(REPO, file, commit, 0, 4)
    assert len(stand_in.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("count", [0, 1, 100_000])
def test_connection_that_ends_early_gives_what_came_and_then_fails(stand_in, hub, file, commit, count):
    stand_in.fail(NAME, cut=(count, 1))
    found = b""
    with pytest.raises(HubUnreachable), hub.stream(REPO, file, commit, 10) as body:
        for chunk in body.chunks:
            found += chunk
    assert found == DATA[10 : 10 + count]
    with hub.stream(REPO, file, commit, 10 + count) as body:
        assert found + b"".join(body.chunks) == DATA[10:]


def test_answer_without_a_length_must_have_the_one_of_its_range(stand_in, hub, commit):
    stand_in.fail(NAME, cut=(5, 1), storage_headers={"Content-Length": None})
    with (
        pytest.raises(HubUnreachable, match="5 bytes shorter"),
        hub.stream(REPO, NAME, commit, 10, 20) as body,
    ):
        b"".join(body.chunks)
    assert hub.read(REPO, NAME, commit, 10, 10) == DATA[10:20]
    stand_in.fail(NAME, storage_headers={"Content-Length": None, "Content-Range": "bytes 10-99/100"})
    with pytest.raises(HubAnswerInvalid, match="longer"), hub.stream(REPO, NAME, commit, 10) as body:
        b"".join(body.chunks)


def test_whole_file_without_a_length_is_an_invalid_answer(stand_in, hub, file, commit):
    stand_in.fail(NAME, storage_headers={"Content-Length": None})
    with pytest.raises(HubAnswerInvalid, match="length"), hub.stream(REPO, file, commit):
        pass


def test_connection_that_stalls_fails_after_the_timeout(stand_in, file, commit):
    stand_in.fail(NAME, slow=threading.Event())
    hub = Hub(endpoint=stand_in.url, timeout_s=0.1)
    with pytest.raises(HubUnreachable, match="in time"), hub.stream(REPO, file, commit) as body:
        b"".join(body.chunks)
    hub.close()


def test_block_can_be_left_before_the_end(stand_in, hub, file, commit):
    stand_in.fail(NAME, slow=threading.Event())
    with hub.stream(REPO, file, commit) as body:
        chunk = next(body.chunks)
        assert chunk
        assert DATA.startswith(chunk)
    stand_in.heal()
    assert hub.read(REPO, file, commit, 0, 4) == DATA[:4]


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"status": (404, 1)}, ModelNotFound),
        ({"status": (401, 1)}, HubAccessDenied),
        ({"gated": True}, HubAccessDenied),
        ({"private": True}, HubAccessDenied),
        ({"rate_limited": 1}, HubRateLimited),
        ({"status": (503, 1)}, HubUnreachable),
        ({"status": (418, 1)}, HubAnswerInvalid),
        ({"storage_status": (429, 1)}, HubRateLimited),
        ({"storage_status": (500, 1)}, HubUnreachable),
        ({"storage_status": (400, 1)}, HubUnreachable),
        ({"storage_status": (403, 1)}, HubUnreachable),
        ({"storage_status": (404, 1)}, HubUnreachable),
        ({"storage_status": (204, 1)}, HubUnreachable),
    ],
)
def test_each_refusal_has_its_error(stand_in, hub, file, commit, knobs, error):
    stand_in.fail(NAME, **knobs)
    with pytest.raises(error) as caught, hub.stream(REPO, file, commit):
        pass
    assert type(caught.value) is error


def test_file_that_the_commit_does_not_have_is_not_found(hub, commit):
    with pytest.raises(ModelNotFound) as caught:
        hub.read(REPO, "none.gguf", commit, 0, 4)
    assert caught.value.metadata["model"] == f"owner/repo/none.gguf@{commit}"


def test_token_and_signed_addresses_are_in_no_log_line_and_no_error(
    stand_in, hub_with_token, file, commit, caplog
):
    caplog.set_level(logging.DEBUG)
    texts = []
    for knobs in (
        {},
        {"status": (500, 1)},
        {"cut": (5, 1)},
        {"storage_status": (403, 1)},
        {"status": (403, 2)},
    ):
        stand_in.heal()
        stand_in.fail(EVERYTHING, **knobs)
        for call in (
            lambda: hub_with_token.resolve(Reference(REPO)),
            lambda: hub_with_token.read(REPO, file, commit, 0, 9),
        ):
            try:
                call()
            except (HubUnreachable, HubAccessDenied) as exc:
                texts += [str(exc), str(exc.to_record()), repr(exc.__cause__)]
    texts += [record.getMessage() for record in caplog.records]
    assert len(texts) > 4
    assert not any(secret in text for text in texts for secret in (TOKEN, SIGNATURE))
    assert TOKEN not in repr(hub_with_token)


def test_several_threads_read_at_the_same_time(hub, file, commit):
    step = 10_000
    starts = range(0, len(DATA) - step, step)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: hub.read(REPO, file, commit, start, step), starts))
    assert b"".join(parts) == DATA[: len(parts) * step]


def test_file_is_served_from_the_disk_and_damaged_as_asked(stand_in, hub, tmp_path):
    """Of the stand-in: what the tests of downloads rely on."""
    path = tmp_path / "b.gguf"
    path.write_bytes(DATA)
    digest = stand_in.add(REPO, "b.gguf", path)
    file, commit = HubFile("b.gguf", digest, len(DATA)), stand_in.commit(REPO)
    offsets: queue.SimpleQueue[int] = queue.SimpleQueue()
    stand_in.fail("b.gguf", corrupt=1, on_chunk=offsets.put)
    assert hub.read(REPO, file, commit, 1, 9) == bytes([DATA[1] ^ 0xFF]) + DATA[2:10]
    assert hub.read(REPO, file, commit, 1, 9) == DATA[1:10]
    assert [offsets.get(timeout=30) for _ in range(2)] == [10, 10]
