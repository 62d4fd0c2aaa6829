"""SIGHUP to a server, from the beginning of its start: it reloads, or its terminal was closed and it ends.

Imports nothing that takes time: until it is at work, SIGHUP ends the process.
"""

from __future__ import annotations

import os
import signal
from types import TracebackType
from typing import Any, Self


class Hangups:
    """Keeps what comes before the server can act on it. A context manager, for the main thread.

    A terminal that is closed ends what was started from it, as it ends other programs. Whoever starts a
    server with nohup wants it to outlive its terminal.
    """

    def __init__(self) -> None:
        self.came = False  # and nobody has acted on it yet
        self._may_end = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGHUP)
        self._may_end = self._before is not signal.SIG_IGN and _has_terminal()
        signal.signal(signal.SIGHUP, self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGHUP, self._before)

    @property
    def terminal_is_closed(self) -> bool:
        """Whether the terminal that this process ends with is there no more."""
        return self._may_end and not _has_terminal()

    def _keep(self, number: int, frame: object) -> None:
        if self.terminal_is_closed:  # there is nothing yet that has to be taken down
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGHUP)
        self.came = True


def _has_terminal() -> bool:
    """Whether this process has a terminal that could hang up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
