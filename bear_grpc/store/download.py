"""One file under way as a whole: its bytes come, are hashed as they come, and go to the disk meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

from ..types import PullStage
from .hashing import hash_file
from .partial import Ended, Partial
from .transfer import CONNECTIONS, Transfer

TICK_S = 0.1
FLUSH_S = 0.5


class Download:
    """Completes a partial file and hashes it. `run` once, in one thread; it starts others, and ends them."""

    def __init__(self, transfer: Transfer, partial: Partial) -> None:
        self._transfer = transfer
        self._partial = partial
        self._hashed_bytes = 0

    @property
    def progress(self) -> tuple[PullStage, int]:
        """What is being done, and how many bytes of it are done."""
        present = self._partial.present_bytes
        if present < self._partial.size_bytes:
            return PullStage.DOWNLOADING, present
        return PullStage.VERIFYING, self._hashed_bytes

    def run(self, tick: Callable[[], None]) -> str:
        """Blocks until all bytes are there; their SHA-256 in hex.

        `tick` is called several times a second in this thread, and may raise to stop it. Raises that, the
        errors of `Hub.stream`, and OSError. What has come stays in the partial file in any case.
        """
        self._partial.resume()
        with ThreadPoolExecutor(CONNECTIONS + 2, thread_name_prefix="download") as threads:
            hashing = threads.submit(
                hash_file, self._partial.handle, self._partial.size_bytes, self._available
            )
            works: list[Future[Any]] = [threads.submit(self._transfer.run, threads), hashing]
            flushing = threads.submit(self._flush)
            try:
                tick()
                while not _are_done(works):
                    tick()
            finally:
                self._partial.end()
                self._transfer.abort()
        errors = [error for work in (*works, flushing) if (error := work.exception()) is not None]
        # Those that were only told to end have nothing to say.
        for error in sorted(errors, key=lambda error: isinstance(error, Ended)):
            raise error
        return hashing.result()

    def _available(self, position: int) -> int:
        self._hashed_bytes = position
        return self._partial.wait_beyond(position)

    def _flush(self) -> None:
        """Keeps what the disk has not taken yet small, so that the wait at the end is short."""
        while not self._partial.ending.wait(FLUSH_S):
            self._partial.sync()


def _are_done(works: list[Future[Any]]) -> bool:
    """Waits a moment for all of them, or for the first that fails."""
    done, not_done = wait(works, TICK_S, FIRST_EXCEPTION)
    return not not_done or any(work.exception() is not None for work in done)
