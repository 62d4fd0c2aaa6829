"""The missing bytes of one file, over several connections. Whether they are right is not known here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import HubUnreachable
from .listing import HubFile, Resolved
from .partial import Ended, Partial
from .rate import RateLimiter

if TYPE_CHECKING:
    from .hub import Body, Hub

log = logging.getLogger(__name__)

CONNECTIONS = 4
MAX_ATTEMPTS = 5  # without a byte more
WRITE_BYTES = 2**20
WRITE_S = 0.25  # on slow connections: what a kill may lose
WRITE_PIECES = 256  # below what one call of the system takes


def backoff_s(attempt: int) -> float:
    """Seconds before another attempt; the first one is 1."""
    return min(0.5 * 2.0 ** (attempt - 1), 8.0)


class Transfer:
    """Fetches the missing segments of a file, once; stops when the partial file's `end` is called."""

    def __init__(
        self,
        hub: Hub,
        resolved: Resolved,
        file: HubFile,
        partial: Partial,
        limiter: RateLimiter,
        pause: Callable[[int], float] = backoff_s,
    ) -> None:
        """`pause` gives the seconds before an attempt, from 1 on, that follows one without a byte more."""
        self._hub, self._resolved, self._file = hub, resolved, file
        self._partial = partial
        self._limiter = limiter
        self._pause = pause
        self._lock = threading.Lock()
        self._waiting = partial.missing()[::-1]  # the next one is the last
        self._has_ranges = True
        self._helpers: list[Future[None]] = []
        self._open: list[Body] = []

    def abort(self) -> None:
        """Any thread, after the partial file's `end`: nobody waits for bytes any more."""
        with self._lock:
            for body in self._open:
                body.abort()

    def run(self, threads: ThreadPoolExecutor) -> None:
        """Blocks until no segment is missing; `threads` has room for CONNECTIONS - 1 more.

        Raises the errors of `Hub.stream`, OSError of the disk, and Ended.
        """
        try:
            self._fetch_segments(threads)
        except Ended:
            # The error of the helper that has ended all tells more.
            self._join_helpers()
            raise
        finally:
            wait(self._helpers)
        self._join_helpers()
        if not self._has_ranges:
            self._persist(self._fetch_stream, lambda: self._partial.present_bytes)
        assert not self._partial.missing()

    def _join_helpers(self) -> None:
        wait(self._helpers)
        errors = [error for helper in self._helpers if (error := helper.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Ended)):
            raise error

    def _fetch_segments(self, threads: ThreadPoolExecutor | None) -> None:
        """Fetches segments until none waits or the server turns out to send whole files only."""
        try:
            while self._has_ranges and (index := self._claim()) is not None:
                self._fetch_segment(index, threads)
        except BaseException:
            self._partial.end()
            raise

    def _claim(self) -> int | None:
        with self._lock:
            return self._waiting.pop() if self._waiting else None

    def _fetch_segment(self, index: int, threads: ThreadPoolExecutor | None) -> None:
        def receive() -> None:
            start, stop = self._partial.extent(index)
            with self._stream(start, stop) as body:
                if body.start != start or not body.accepts_ranges:
                    self._has_ranges = False
                    return
                if threads is not None and not self._helpers:
                    self._start_helpers(threads)
                self._pour(body.chunks, start, stop)

        self._persist(receive, lambda: self._partial.extent(index)[0])

    def _fetch_stream(self) -> None:
        with self._stream() as body:
            self._pour(body.chunks, body.start, self._partial.size_bytes)

    @contextmanager
    def _stream(self, start: int = 0, stop: int | None = None) -> Iterator[Body]:
        model = self._resolved
        with self._hub.stream(model.repo_id, self._file, model.commit, start, stop) as body:
            with self._lock:
                self._open.append(body)
            try:
                # The end may have come while the answer was awaited: then nobody aborts this one.
                if self._partial.ending.is_set():
                    raise Ended
                yield body
            finally:
                with self._lock:
                    self._open.remove(body)

    def _start_helpers(self, threads: ThreadPoolExecutor) -> None:
        """Only now that the first answer has shown that the server sends ranges."""
        count = min(CONNECTIONS - 1, len(self._waiting))
        self._helpers = [threads.submit(self._fetch_segments, None) for _ in range(count)]

    def _persist(self, receive: Callable[[], None], position: Callable[[], int]) -> None:
        """Calls again what the connection has cut short, as long as it brings something now and then."""
        attempt = 0
        while True:
            before = position()
            try:
                return receive()
            except HubUnreachable as exc:
                attempt = 1 if position() > before else attempt + 1
                # Without a hint when to try again, it never helps: the server is offline or stopping.
                if exc.retry_after_s is None or attempt > MAX_ATTEMPTS:
                    raise
                log.info("%s at byte %d: %s; attempt %d follows", self._file.file, position(), exc, attempt)
            if self._partial.ending.wait(self._pause(attempt)):
                raise Ended

    def _pour(self, chunks: Iterable[bytes], position: int, stop: int) -> None:
        """Writes chunks that begin at `position` and may go beyond `stop`, where they are missing."""
        sink = _Sink(self._partial)
        size = self._partial.segment_bytes
        try:
            for chunk in chunks:
                self._limiter.take(len(chunk), self._partial.ending)
                if self._partial.ending.is_set():
                    raise Ended
                view = memoryview(chunk)[: stop - position]
                is_beyond = len(view) < len(chunk)
                while view:
                    piece = view[: size - position % size]
                    sink.put(position, piece)
                    position += len(piece)
                    view = view[len(piece) :]
                # Not before: a body that has been read to its end leaves its connection for the next one.
                if is_beyond:
                    break
        finally:
            sink.flush()


class _Sink:
    """Puts small pieces together to larger writes."""

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self._index = -1
        self._pieces: list[memoryview] = []
        self._count = 0
        self._flushed_at = time.monotonic()

    def put(self, offset: int, data: memoryview) -> None:
        """Takes bytes of one segment; those that are there already are left out."""
        index = offset // self._partial.segment_bytes
        if index != self._index:
            self.flush()
            self._index = index
        start, stop = self._partial.extent(index)
        fresh = data[start + self._count - offset :] if offset < start + self._count else data
        if not fresh:
            return
        self._pieces.append(fresh)
        self._count += len(fresh)
        if (
            self._count >= WRITE_BYTES
            or start + self._count == stop
            or len(self._pieces) >= WRITE_PIECES
            or time.monotonic() - self._flushed_at >= WRITE_S
        ):
            self.flush()

    def flush(self) -> None:
        """Writes what has been put. Raises OSError; then it is gone, and counts as not received."""
        pieces, self._pieces, self._count = self._pieces, [], 0
        self._flushed_at = time.monotonic()
        if pieces:
            self._partial.append(self._index, pieces)
