"""The thread that starts worker processes.

The kernel ties two things to the thread that starts a process: the death
signal follows that thread, and the child inherits its nice value. So one
thread starts all workers and lives as long as the server.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping

from .. import suspects
from ..types import SandboxMode
from .confinement import Confinement
from .process import WorkerProcess

_ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # llama.cpp would start gdb when it aborts
    "PYTHONFAULTHANDLER": "1",
}
# Beginnings of names: of this server's settings, of those that the hub's tools read, and of those of
# OpenTelemetry, whose headers may hold a token.
_WITHHELD = ("BEAR_", "HF_", "HUGGING", "OTEL_")


class Spawner(threading.Thread):
    """Starts workers, one after the other. Make it before anything lowers its priority.

    `confinement` is what its workers have told of their sandbox.
    """

    def __init__(self, sandbox: SandboxMode = SandboxMode.AUTO, module: str = "bear_grpc.worker") -> None:
        """`module` is what a worker's interpreter runs."""
        super().__init__(name="spawner", daemon=True)
        self.confinement = Confinement(sandbox)
        self._module = module
        self._orders: queue.SimpleQueue[concurrent.futures.Future[WorkerProcess] | None] = queue.SimpleQueue()
        self.start()

    def order(self) -> concurrent.futures.Future[WorkerProcess]:
        """Any thread: a worker that waits for its first frame. The future may hold OSError."""
        future: concurrent.futures.Future[WorkerProcess] = concurrent.futures.Future()
        self._orders.put(future)
        return future

    def close(self) -> None:
        """Ends the thread, and with it, on Linux, every worker that is still there."""
        self._orders.put(None)

    def run(self) -> None:
        while (future := self._orders.get()) is not None:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(_start(self._module, self.confinement))
            except OSError as exc:
                future.set_exception(exc)


def worker_environment(server: Mapping[str, str]) -> dict[str, str]:
    """What a worker gets of the server's environment: settings and tokens are not for native code."""
    kept = {name: value for name, value in server.items() if not name.startswith(_WITHHELD)}
    return {**kept, **_ENVIRONMENT}


def _start(module: str, confinement: Confinement) -> WorkerProcess:
    page_fd = suspects.create()
    try:
        ours, theirs = socket.socketpair()
    except OSError:
        os.close(page_fd)
        raise
    with theirs:
        try:
            # A group of its own, so that a terminal's Ctrl-C reaches the server only. Not a
            # session of its own: the kernel's autogroups would undo the priorities.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(page_fd), confinement.mode],
                pass_fds=[theirs.fileno(), page_fd],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                process_group=0,
                env=worker_environment(os.environ),
            )
            page = suspects.SuspectsPage(page_fd)
        except OSError:
            ours.close()
            raise
        finally:
            os.close(page_fd)
    return WorkerProcess(process, ours, page, confinement)
