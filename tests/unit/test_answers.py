"""What single answers of the hub mean, without a hub."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from bear_grpc.errors import HubAnswerInvalid, HubUnreachable
from bear_grpc.store.answers import MAX_ANSWER_S, BoundedStream, check_target, guard, refusal


class Chunks(httpx2.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield from (b"a", b"b", b"c", b"d")


@pytest.mark.parametrize(("limit", "seconds"), [('"api";r=0;t=55', 55), ('"api";r=9;t=55', 30), ("r=0", 30)])
def test_rate_limit_is_also_read_from_the_hubs_own_header(limit, seconds):
    request = httpx2.Request("GET", "https://hub.example/")
    response = httpx2.Response(429, headers={"RateLimit": limit}, request=request)
    assert refusal(response, "name", "owner/repo", has_token=False, is_hub=True).retry_after_s == seconds


def test_answer_that_takes_too_long_is_given_up():
    times = iter([0.0, 1.0, MAX_ANSWER_S, MAX_ANSWER_S + 1])
    stream = BoundedStream(Chunks(), lambda: next(times))
    found = []
    with pytest.raises(HubUnreachable):
        for chunk in stream:
            found.append(chunk)
    assert found == [b"a", b"b"]


@pytest.mark.parametrize("target", ["http://hub.example/x", "ftp://hub.example/x", "file:///etc/passwd"])
def test_redirect_from_a_secure_hub_stays_secure(target):
    request = httpx2.Request("GET", "https://hub.example/")
    with pytest.raises(HubAnswerInvalid):
        guard(httpx2.Response(302, headers={"Location": target}, request=request))
    with pytest.raises(HubAnswerInvalid):
        check_target(httpx2.URL(target), allow_http=False)
