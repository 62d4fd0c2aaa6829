"""The model hub: what a name stands for, and the bytes of a file.

Identity comes through the hub's own client, bytes through a client of ours:
by ranges, without a cache on the disk, and to be stopped at any chunk. What the
hub answers is not trusted: names, sizes and checksums are checked, and no
header of an answer ever becomes a path.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import HfApi, ModelInfo

from ..errors import HubAnswerInvalid, HubUnreachable, InvalidField
from ..types import HubSource
from .answers import Extent, check_linked, check_target, extent_of, guard, refusal, unreachable
from .listing import HubFile as HubFile
from .listing import Listed, pin
from .listing import Resolved as Resolved
from .reference import Reference, check_source

MAX_LISTED_FILES = 100_000
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
USER_AGENT = "bear_grpc"


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes of a file under way.

    `chunks` begins at `start`, which is 0 where the server has ignored the range, and ends at the end asked
    for; it raises HubUnreachable when the connection ends early. `total` is the size of the whole file.
    `abort` may be called from any thread: it ends the connection, and with it a read that waits for bytes.
    """

    chunks: Iterator[bytes]
    start: int
    total: int
    accepts_ranges: bool
    abort: Callable[[], None]


class Hub:
    """One hub, reached as the server is configured. All calls block; any thread, several at a time.

    `timeout_s` bounds the wait for a connection and for each next part of an answer. No error or log line
    has the token in it. Raises InvalidField for a token that no header can carry.
    """

    def __init__(
        self, *, endpoint: str, token: str = "", offline: bool = False, timeout_s: float = 10.0
    ) -> None:
        if not all("!" <= character <= "~" for character in token):
            raise InvalidField("hub_token", "must be printable ASCII without spaces")
        _prepare_client()
        self._endpoint = httpx2.URL(endpoint.rstrip("/"))
        self._token = token
        self._offline = offline
        self._timeout_s = timeout_s
        self._api = HfApi(
            endpoint=str(self._endpoint), token=token or False, headers={"user-agent": USER_AGENT}
        )
        self._client = httpx2.Client(
            headers={"accept-encoding": "identity", "user-agent": USER_AGENT},
            timeout=timeout_s,
            cookies=_no_cookies(),
        )

    def resolve(self, reference: Reference) -> Resolved:
        """The files that a reference means at this moment.

        Raises ModelNotFound, InvalidField (several may be meant), HubAccessDenied, HubRateLimited,
        HubUnreachable and HubAnswerInvalid.
        """
        info = self._model_info(reference)
        siblings = info.siblings or []
        if len(siblings) > MAX_LISTED_FILES:
            raise HubAnswerInvalid(f"{reference.repo_id} has more than {MAX_LISTED_FILES} files")
        listed: dict[str, Listed] = {}
        for sibling in siblings:
            name: object = sibling.rfilename
            if not isinstance(name, str) or name in listed:
                raise HubAnswerInvalid(f"{reference.repo_id} lists a file twice, or one without a name")
            lfs = sibling.lfs
            listed[name] = Listed(
                sibling.size if lfs is None else lfs.size, None if lfs is None else lfs.sha256
            )
        return pin(reference, info.sha, listed)

    @contextmanager
    def stream(
        self, repo_id: str, file: HubFile | str, commit: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Body]:
        """Bytes `start` to `stop` (None: the end) of a file; leaving the block closes the connection.

        With a `HubFile`, what the hub tells of its size and checksum is compared. Raises as `resolve`.
        """
        response, extent = self._open(repo_id, file, commit, start, stop)
        try:
            if isinstance(file, HubFile) and extent.total != file.size_bytes:
                raise HubAnswerInvalid(f"{file.file} has {extent.total} bytes there, not {file.size_bytes}")
            accepts = response.status_code == 206 or response.headers.get("Accept-Ranges") == "bytes"
            abort = functools.partial(_shut_down, response)
            yield Body(_chunks(response, extent), extent.start, extent.total, accepts, abort)
        finally:
            response.close()

    def read(self, repo_id: str, file: HubFile | str, commit: str, start: int, count: int) -> bytes:
        """Exactly `count` bytes from `start`. Raises as `stream`; HubAnswerInvalid if there are fewer."""
        data = bytearray()
        with self.stream(repo_id, file, commit, start, start + count) as body:
            if start + count > body.total:
                raise HubAnswerInvalid(f"the file ends at byte {body.total}, before {start + count}")
            skip = start - body.start
            for chunk in body.chunks:
                data += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(data) >= count:
                    break
        return bytes(data[:count])

    def close(self) -> None:
        """Closes connections that are not in use; the hub cannot be used any more."""
        self._client.close()

    def _check_online(self) -> None:
        if self._offline or constants.is_offline_mode():
            raise HubUnreachable("the server is set to be offline", None)
        if self._client.is_closed:
            raise HubUnreachable("the server is stopping", None)

    def _model_info(self, reference: Reference) -> ModelInfo:
        """The repository at the revision, in one request."""
        self._check_online()
        try:
            return self._api.model_info(
                reference.repo_id,
                revision=reference.revision,
                timeout=self._timeout_s,
                files_metadata=True,
            )
        except HfHubHTTPError as exc:
            raise refusal(
                exc.response, reference.name, reference.repo_id, has_token=bool(self._token), is_hub=True
            ) from exc
        except httpx2.HTTPError as exc:
            raise unreachable(self._endpoint.host, exc) from exc
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise HubAnswerInvalid(
                f"what it tells of {reference.repo_id} is no description of a model"
            ) from exc

    def _open(
        self, repo_id: str, file: HubFile | str, commit: str, start: int, stop: int | None
    ) -> tuple[httpx2.Response, Extent]:
        """The answer that brings the bytes, through redirects; the caller closes it."""
        self._check_online()
        path = file if isinstance(file, str) else file.file
        check_source(HubSource(repo_id, path, commit))
        url = httpx2.URL(f"{self._endpoint}/{repo_id}/resolve/{quote(commit, safe='')}/{quote(path)}")
        for _ in range(MAX_REDIRECTS + 1):
            is_hub = url.origin == self._endpoint.origin
            response = self._get(url, start, stop, with_token=is_hub)
            try:
                if is_hub and response.status_code < 400:
                    check_linked(response, commit, file)
                if response.status_code in (200, 206):
                    return response, extent_of(response, start, stop)
                if response.status_code not in REDIRECTS:
                    name = Reference(repo_id, path, revision=commit).name
                    raise refusal(response, name, repo_id, has_token=bool(self._token), is_hub=is_hub)
                url = self._target_of(response)
            except BaseException:
                response.close()
                raise
            response.close()
        raise HubUnreachable(f"{self._endpoint.host}: more than {MAX_REDIRECTS} redirects")

    def _get(self, url: httpx2.URL, start: int, stop: int | None, *, with_token: bool) -> httpx2.Response:
        headers = {}
        if start or stop is not None:
            headers["range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if with_token and self._token:
            headers["authorization"] = f"Bearer {self._token}"
        try:
            return self._client.send(self._client.build_request("GET", url, headers=headers), stream=True)
        except httpx2.HTTPError as exc:
            raise unreachable(url.host, exc) from exc

    def _target_of(self, response: httpx2.Response) -> httpx2.URL:
        """Where a redirect leads, if that is a place to go."""
        try:
            target = response.url.join(response.headers["Location"])
        except (httpx2.InvalidURL, KeyError) as exc:
            raise HubAnswerInvalid("it redirects to no address") from exc
        check_target(target, allow_http=self._endpoint.scheme == "http")
        return target


def _chunks(response: httpx2.Response, extent: Extent) -> Iterator[bytes]:
    """Bytes as they come, exactly as many as were announced."""
    left = extent.stop - extent.start
    try:
        for chunk in response.iter_raw():
            left -= len(chunk)
            if left < 0:
                raise HubAnswerInvalid("it is longer than announced")
            yield chunk
    except httpx2.HTTPError as exc:
        raise unreachable(response.url.host, exc) from exc
    if left:
        raise HubUnreachable(f"{response.url.host}: the answer is {left} bytes shorter than announced")


def _shut_down(response: httpx2.Response) -> None:
    """Ends the connection under an answer; whoever reads it sees its end."""
    connection = response.extensions["network_stream"].get_extra_info("socket")
    # The plain socket's: that of TLS would change what the reading thread is using.
    with contextlib.suppress(OSError):  # it has ended by itself
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _no_cookies() -> CookieJar:
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))


@functools.cache
def _prepare_client() -> None:
    """Makes the hub's own client keep to this server's rules, once a process."""
    # It would ask for a list of agents, and name one in a header.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    # Addresses that the hub signs open private files, and these loggers tell every address.
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    set_client_factory(
        lambda: httpx2.Client(
            headers={"accept-encoding": "identity"},
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            event_hooks={"response": [guard]},
            cookies=_no_cookies(),
            # Few requests: nothing is left open that nobody closes.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )
    )
