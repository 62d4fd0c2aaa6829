"""A worker's process as the server holds it: its signals, its memory, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

from .. import suspects
from .confinement import Confinement

# What the kernel has killed is gone at once, unless a driver or a file system holds it.
KILL_GRACE_S = 5.0
NOT_ENDED = "not ended by SIGKILL"


class WorkerProcess:
    """A started worker: its process, and the server's end of the socket pair."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        sock: socket.socket,
        page: suspects.SuspectsPage,
        confinement: Confinement,
    ) -> None:
        self._process = process
        self._page = page
        self.sock = sock
        self.confinement = confinement
        assert process.stderr is not None
        self.stderr = process.stderr
        self.pid = process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the kernel has taken everything back. No other process is taken for it: it is a child."""
        return self._process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, or a debugger; False where the system does not tell."""
        try:
            # Its name, in parentheses, may hold any character.
            state = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except (OSError, IndexError):
            return False
        return state in (b"T", b"t")

    def kill(self) -> None:
        """Ends it at once, with everything it may have started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def dump(self) -> None:
        """Asks for the Python stacks of all its threads, on its stderr."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGUSR1)

    def suspects(self) -> suspects.Suspects:
        """What it was working on, once it has ended; to be asked once."""
        found = self._page.read()
        self._page.close()
        return found

    def wait(self, timeout_s: float) -> str:
        """Blocks until it has ended, kills it after `timeout_s`; tells how it ended.

        NOT_ENDED if it is still there KILL_GRACE_S after that.
        """
        for grace_s in (timeout_s, KILL_GRACE_S):
            try:
                return _told(self._process.wait(grace_s))
            except subprocess.TimeoutExpired:
                self.kill()
        return NOT_ENDED

    def discard(self) -> None:
        """Ends it at once and forgets it; for a worker that nobody is connected to."""
        self.kill()
        self.sock.close()
        self.stderr.close()
        self._page.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_GRACE_S)

    def memory_bytes(self) -> int:
        """Its proportional set size; 0 where the system does not tell."""
        try:
            text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        except OSError:
            return 0
        for line in text.splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        return 0

    def left_bytes(self) -> int:
        """What a process that does not end still holds; 0 once it has ended, or where nothing is told.

        Its resident set: to read the proportional one takes a lock that such a process may hold.
        """
        if self.has_ended:
            return 0
        try:
            resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return resident * os.sysconf("SC_PAGE_SIZE")


def _told(code: int) -> str:
    """What an exit code means."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
