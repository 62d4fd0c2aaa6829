"""What the hub's HTTP answers mean: which error, which bytes of a file, and how much of an answer is read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx2

from ..errors import (
    BearError,
    HubAccessDenied,
    HubAnswerInvalid,
    HubRateLimited,
    HubUnreachable,
    ModelNotFound,
)
from .listing import HubFile, is_sha256

MAX_ANSWER_BYTES = 2**26  # of a listing: some 600 bytes a file
MAX_ANSWER_S = 60.0
UNREACHABLE_RETRY_S = 5.0
RATE_LIMIT_RETRY_S = 30.0
MAX_RETRY_S = 3600.0

_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
# The hub's own header: nothing remains, and in how many seconds there is more.
_RATE_LIMIT = re.compile(r";\s*r=0\s*;\s*t=(\d{1,9})")
_LENGTH = re.compile(r"\d{1,15}")


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes that an answer brings, of a file of `total` bytes."""

    start: int
    stop: int
    total: int


def extent_of(response: httpx2.Response, start: int, stop: int | None) -> Extent:
    """What a 200 or 206 to the range asked for brings. Raises HubAnswerInvalid."""
    _check_encoding(response)
    length = response.headers.get("Content-Length")
    if length is not None and not _LENGTH.fullmatch(length):
        raise HubAnswerInvalid("its Content-Length is no number")
    if response.status_code == 200:
        if length is None:
            raise HubAnswerInvalid("it does not tell the length of the file")
        return Extent(0, int(length), int(length))
    text = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    if response.status_code != 206 or match is None:
        raise HubAnswerInvalid(f"status {response.status_code} with Content-Range {text[:80]!r}")
    first, last, total = (int(number) for number in match.groups())
    wanted_stop = total if stop is None else min(stop, total)
    if first != start or last + 1 != wanted_stop:
        raise HubAnswerInvalid(f"asked for bytes {start} to {wanted_stop - 1}, Content-Range is {text!r}")
    if length is not None and int(length) != wanted_stop - start:
        raise HubAnswerInvalid(f"Content-Length {length} contradicts Content-Range {text!r}")
    return Extent(start, wanted_stop, total)


def check_linked(response: httpx2.Response, commit: str, file: HubFile | str) -> None:
    """Compares what the hub tells of a file with what is known of it. Raises HubAnswerInvalid."""
    told_commit = response.headers.get("X-Repo-Commit")
    if told_commit is not None and told_commit != commit:
        raise HubAnswerInvalid(f"asked for commit {commit}, the answer is of another")
    if isinstance(file, str):
        return
    etag = response.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
    if is_sha256(etag) and etag != file.sha256:
        raise HubAnswerInvalid(f"{file.file} has SHA-256 {etag} there, the listing said {file.sha256}")


def refusal(
    response: httpx2.Response, name: str, repo_id: str, *, has_token: bool, is_hub: bool
) -> BearError:
    """The error that an answer means; not `is_hub`: it comes from where the hub has sent us."""
    status, host = response.status_code, response.url.host
    if status == 429:
        return HubRateLimited(_retry_after_s(response, RATE_LIMIT_RETRY_S))
    if status >= 500 or status == 408:
        return HubUnreachable(f"{host} answers {status}", _retry_after_s(response, UNREACHABLE_RETRY_S))
    if status == 416:
        return HubAnswerInvalid(f"{host} refuses the range of bytes that was asked for")
    if not is_hub:
        # The hub has let us in; an address that it signs is valid for a while only, and the next one will do.
        return HubUnreachable(f"{host} answers {status}")
    if status in (401, 403, 451):
        return HubAccessDenied(repo_id, _denial(response, has_token))
    if status in (404, 410):
        return ModelNotFound(name)
    return HubAnswerInvalid(f"{host} answers {status}")


def unreachable(host: str, error: httpx2.HTTPError) -> HubUnreachable:
    """The error for a request that got no answer, or not the whole of one."""
    match error:
        case httpx2.TimeoutException():
            problem = "no answer in time"
        case httpx2.TooManyRedirects():
            problem = "too many redirects"
        case httpx2.NetworkError():
            problem = str(error) or "the connection failed"
        case _:
            # Texts of protocol errors quote what was sent.
            problem = "the connection ended early or did not speak HTTP"
    return HubUnreachable(f"{host}: {problem}")


def guard(response: httpx2.Response) -> None:
    """A hook for clients that follow redirects and read answers into memory.

    Keeps to the endpoint's security and bounds each answer. Raises HubAnswerInvalid.
    """
    _check_encoding(response)
    if response.has_redirect_location:
        try:
            target = response.url.join(response.headers["Location"])
        except httpx2.InvalidURL as exc:
            raise HubAnswerInvalid("it redirects to no address") from exc
        check_target(target, allow_http=response.url.scheme == "http")
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = BoundedStream(response.stream)


def check_target(target: httpx2.URL, *, allow_http: bool) -> None:
    """Whether a redirect may be followed. Raises HubAnswerInvalid."""
    if target.scheme != "https" and not (allow_http and target.scheme == "http"):
        raise HubAnswerInvalid(f"it redirects to {target.scheme}:")
    if not target.host:
        raise HubAnswerInvalid("it redirects to no host")


class BoundedStream(httpx2.SyncByteStream):
    """An answer's body: HubAnswerInvalid after too many bytes, HubUnreachable after too much time."""

    def __init__(self, stream: httpx2.SyncByteStream, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    def __iter__(self) -> Iterator[bytes]:
        deadline = self._clock() + MAX_ANSWER_S
        count = 0
        for chunk in self._stream:
            count += len(chunk)
            if count > MAX_ANSWER_BYTES:
                raise HubAnswerInvalid(f"it is longer than {MAX_ANSWER_BYTES} bytes")
            if self._clock() > deadline:
                raise HubUnreachable(f"an answer takes more than {MAX_ANSWER_S:.0f} s")
            yield chunk

    def close(self) -> None:
        """Closes the connection or gives it back."""
        self._stream.close()


def _check_encoding(response: httpx2.Response) -> None:
    """Raises HubAnswerInvalid: none was asked for, and lengths must be those of what is read."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubAnswerInvalid("it is compressed")


def _denial(response: httpx2.Response, has_token: bool) -> str:
    is_gated = response.headers.get("X-Error-Code") == "GatedRepo"
    what = "it is gated" if is_gated else "it is private, disabled, or does not exist"
    token = "the token of this server does not open it" if has_token else "this server has no token"
    return f"{what}; {token}"


def _retry_after_s(response: httpx2.Response, default: float) -> float:
    seconds = response.headers.get("Retry-After", "")
    if (limit := _RATE_LIMIT.search(response.headers.get("RateLimit", ""))) is not None:
        seconds = limit[1]
    return min(max(float(seconds), 1.0), MAX_RETRY_S) if _LENGTH.fullmatch(seconds) else default
