"""What a name stands for, asked through the real client of a stand-in hub."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys

import pytest

from bear_grpc.errors import (
    HubAccessDenied,
    HubAnswerInvalid,
    HubRateLimited,
    HubUnreachable,
    InvalidField,
    ModelNotFound,
)
from bear_grpc.store.answers import MAX_ANSWER_BYTES
from bear_grpc.store.hub import MAX_LISTED_FILES, MAX_REDIRECTS, Hub, HubFile, Resolved
from bear_grpc.store.reference import Reference
from tests.helpers.hub import ALWAYS, EVERYTHING, Listing, StandInHub

REPO = "owner/repo"
MODEL = Reference(REPO, quant="Q4_K_M")


@pytest.fixture(autouse=True)
def model(stand_in: StandInHub) -> None:
    stand_in.add(REPO, "a-Q4_K_M.gguf", b"four bits")
    stand_in.add(REPO, "README.md", b"text")


def test_model_is_pinned_to_its_commit_and_its_bytes_in_one_request(stand_in, hub):
    assert hub.resolve(MODEL) == Resolved(
        name="owner/repo:Q4_K_M",
        repo_id=REPO,
        revision="main",
        commit=stand_in.commit(REPO),
        files=(HubFile("a-Q4_K_M.gguf", hashlib.sha256(b"four bits").hexdigest(), 9),),
    )
    assert len(stand_in.requests) == 1


def test_split_model_has_all_its_parts(stand_in, hub):
    parts = [f"b-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    digests = [stand_in.add(REPO, part, part.encode()) for part in reversed(parts)]
    resolved = hub.resolve(Reference(REPO, quant="Q8_0"))
    assert [(file.file, file.sha256) for file in resolved.files] == list(
        zip(parts, reversed(digests), strict=True)
    )


def test_revision_is_resolved_to_the_commit_of_that_moment(stand_in, hub):
    stand_in.add(REPO, "a-Q4_K_M.gguf", b"another", revision="refs/pr/1")
    first = hub.resolve(MODEL)
    other = hub.resolve(Reference(REPO, quant="Q4_K_M", revision="refs/pr/1"))
    stand_in.add(REPO, "a-Q4_K_M.gguf", b"newer")
    assert hub.resolve(MODEL).commit != first.commit != other.commit
    assert hub.resolve(Reference(REPO, quant="Q4_K_M", revision=first.commit)).files == first.files


@pytest.mark.parametrize(
    "reference",
    [
        Reference("owner/none", quant="Q4_K_M"),
        Reference(REPO, quant="Q4_K_M", revision="none"),
        Reference(REPO, quant="Q8_0"),
        Reference(REPO, "none.gguf"),
    ],
)
def test_unknown_repository_revision_or_file_is_not_found(hub, reference):
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(reference)
    assert caught.value.metadata["model"] == reference.name


@pytest.mark.parametrize(
    "knobs", [{"gated": True}, {"private": True}, {"status": (401, ALWAYS)}, {"status": (403, 9)}]
)
def test_closed_repository_is_denied_and_the_token_is_told_of(stand_in, knobs):
    stand_in.fail(REPO, **knobs)
    for token, text in (("", "has no token"), ("wrong", "does not open it")):
        hub = Hub(endpoint=stand_in.url, token=token)
        with pytest.raises(HubAccessDenied, match=text) as caught:
            hub.resolve(MODEL)
        hub.close()
        assert caught.value.metadata == {"repo_id": REPO}
        assert ("gated" in str(caught.value)) == ("gated" in knobs)


def test_token_opens_what_is_closed(stand_in, hub_with_token):
    stand_in.fail(EVERYTHING, gated=True, private=True)
    resolved = hub_with_token.resolve(MODEL)
    assert hub_with_token.read(REPO, resolved.files[0], resolved.commit, 0, 4) == b"four"


def test_token_of_the_environment_is_never_used(stand_in, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of-someone-else")
    resolved = hub.resolve(MODEL)
    hub.read(REPO, resolved.files[0], resolved.commit, 0, 4)
    assert not any(request.has_authorization for request in stand_in.requests)


@pytest.mark.parametrize("token", ["hf_a\n", "hf a", "hf_\xe4", "hf_\0"])
def test_token_that_no_header_carries_is_refused_and_not_told(token):
    with pytest.raises(InvalidField) as caught:
        Hub(endpoint="http://127.0.0.1", token=token)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("knobs", "seconds"),
    [
        ({"retry_after": "7"}, 7),
        ({"retry_after": None}, 30),
        ({"retry_after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30),
        ({"retry_after": "99999999"}, 3600),
        ({"retry_after": "0"}, 1),
    ],
)
def test_rate_limit_tells_when_to_come_back(stand_in, hub, knobs, seconds):
    stand_in.fail(REPO, rate_limited=1, **knobs)
    with pytest.raises(HubRateLimited) as caught:
        hub.resolve(MODEL)
    assert caught.value.retry_after_s == seconds
    assert hub.resolve(MODEL).files


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408])
def test_server_error_is_no_fault_of_the_model(stand_in, hub, status):
    stand_in.fail(REPO, status=(status, 1))
    with pytest.raises(HubUnreachable, match=str(status)) as caught:
        hub.resolve(MODEL)
    assert caught.value.retry_after_s == 5
    assert len(stand_in.requests) == 1


@pytest.mark.parametrize("status", [204, 304, 400, 405])
def test_status_that_makes_no_sense_is_an_invalid_answer(stand_in, hub, status):
    stand_in.fail(REPO, status=(status, 1))
    with pytest.raises(HubAnswerInvalid):
        hub.resolve(MODEL)


def test_redirects_are_followed_with_the_token_and_are_bounded(stand_in, hub_with_token):
    stand_in.fail(REPO, detours=MAX_REDIRECTS)
    assert hub_with_token.resolve(MODEL).files
    assert len(stand_in.requests) == MAX_REDIRECTS + 1
    assert all(request.has_authorization for request in stand_in.requests)
    stand_in.fail(REPO, detours=ALWAYS)
    with pytest.raises(HubUnreachable, match="redirects"):
        hub_with_token.resolve(MODEL)


def test_hub_that_is_not_there_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    hub = Hub(endpoint=f"http://127.0.0.1:{port}")
    with pytest.raises(HubUnreachable, match="refused"):
        hub.resolve(MODEL)
    with pytest.raises(HubUnreachable, match="refused"):
        hub.read(REPO, "a.gguf", "0" * 40, 0, 4)
    hub.close()


def test_hub_that_never_answers_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub = Hub(endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.05)
        with pytest.raises(HubUnreachable, match="in time"):
            hub.resolve(MODEL)
        with pytest.raises(HubUnreachable, match="in time"):
            hub.read(REPO, "a.gguf", "0" * 40, 0, 4)
        hub.close()


def test_offline_server_sends_nothing(stand_in):
    hub = Hub(endpoint=stand_in.url, offline=True)
    with pytest.raises(HubUnreachable, match="offline") as caught:
        hub.resolve(MODEL)
    assert caught.value.retry_after_s is None
    with pytest.raises(HubUnreachable, match="offline"):
        hub.read(REPO, "a-Q4_K_M.gguf", stand_in.commit(REPO), 0, 4)
    hub.close()
    assert stand_in.requests == []


def test_closed_hub_sends_nothing(stand_in, hub):
    hub.close()
    with pytest.raises(HubUnreachable, match="stopping"):
        hub.resolve(MODEL)
    assert stand_in.requests == []


def with_file(**changes: object) -> Listing:
    """A listing whose first file is another; None takes a value away."""

    def change(answer):
        answer["siblings"][0].update(changes)
        return answer

    return change


def with_lfs(**changes: object) -> Listing:
    def change(answer):
        answer["siblings"][0]["lfs"].update(changes)
        return answer

    return change


@pytest.mark.parametrize(
    "listing",
    [
        pytest.param(lambda answer: {**answer, "sha": "../../evil"}, id="commit"),
        pytest.param(lambda answer: {**answer, "sha": None}, id="no commit"),
        pytest.param(lambda answer: {**answer, "sha": ["a"]}, id="commit of another type"),
        pytest.param(lambda answer: {**answer, "siblings": 3}, id="files of another type"),
        pytest.param(lambda answer: {**answer, "siblings": [{}]}, id="file without a name"),
        pytest.param(lambda answer: {**answer, "siblings": answer["siblings"] * 2}, id="file twice"),
        pytest.param(with_file(rfilename="../a-Q4_K_M.gguf"), id="name"),
        pytest.param(with_file(rfilename=7), id="name of another type"),
        pytest.param(with_file(lfs=None), id="no checksum"),
        pytest.param(with_file(lfs="x"), id="checksum of another type"),
        pytest.param(with_lfs(sha256="../" * 21 + "a"), id="checksum"),
        pytest.param(with_lfs(size=0), id="size"),
        pytest.param(with_lfs(size=2**43), id="size too large"),
        pytest.param(lambda _: [1], id="list"),
        pytest.param(lambda _: b"{", id="no JSON"),
        pytest.param(lambda _: b"", id="nothing"),
        pytest.param(lambda _: b"\xff\xfe\x00", id="no text"),
        pytest.param(lambda _: b"[" * 100_000, id="deep"),
        pytest.param(lambda _: b'{"sha": ' + b"9" * 10_000 + b"}", id="large number"),
        pytest.param(
            lambda answer: {
                **answer,
                "siblings": [{"rfilename": str(n)} for n in range(MAX_LISTED_FILES + 1)],
            },
            id="too many files",
        ),
    ],
)
def test_hostile_answer_is_invalid(stand_in, hub, listing):
    stand_in.fail(REPO, listing=listing)
    with pytest.raises(HubAnswerInvalid):
        hub.resolve(MODEL)


def test_answer_that_is_too_long_is_not_read_to_its_end(stand_in, hub):
    stand_in.fail(REPO, listing=lambda _: b" " * (MAX_ANSWER_BYTES + 1))
    with pytest.raises(HubAnswerInvalid, match="longer than"):
        hub.resolve(MODEL)


def test_compressed_answer_is_not_unpacked(stand_in, hub):
    stand_in.fail(REPO, listing_headers={"Content-Encoding": "gzip"})
    with pytest.raises(HubAnswerInvalid, match="compressed"):
        hub.resolve(MODEL)
    assert stand_in.requests[0].headers["accept-encoding"] == "identity"


def test_nothing_but_the_repository_is_asked_for_and_nothing_is_kept_on_the_disk(stand_in, tmp_path):
    """In a process of its own, as the hub's client reads the environment when it is imported."""
    home = tmp_path / "home"
    script = (
        "from bear_grpc.store.hub import Hub; from bear_grpc.store.reference import Reference\n"
        f"hub = Hub(endpoint={stand_in.url!r}, token='hf_x')\n"
        f"resolved = hub.resolve(Reference({REPO!r}))\n"
        f"assert hub.read({REPO!r}, resolved.files[0], resolved.commit, 0, 4) == b'four'\n"
    )
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**cleared, "HF_ENDPOINT": stand_in.url, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    assert [request.path.split("/")[1] for request in stand_in.asked("hub")] == ["api", "owner"]
    assert {request.headers["user-agent"] for request in stand_in.requests} == {"bear_grpc"}
    assert not home.exists()
