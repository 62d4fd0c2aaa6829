"""The worker process's first instructions, in the order that they must have."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import SandboxUnavailable
from ..framing import encode, read_first
from ..protocol import LEVEL_MARKS, Failed, Frame, Load, Probe
from ..suspects import SuspectsPage
from ..types import SandboxMode, SandboxState

if TYPE_CHECKING:
    from ..backend.base import Backend

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Has the kernel kill this process when the server's spawner thread ends (Linux)."""
    if sys.platform != "linux":
        return  # elsewhere the closed socket tells
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _no_core_file() -> None:
    """A core file would hold the prompts of many users, and take minutes to write."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Marked(logging.Formatter):
    """Every line begins with its level, for the server's log."""

    def format(self, record: logging.LogRecord) -> str:
        mark = LEVEL_MARKS.get(record.levelno, "")
        return mark + super().format(record).replace("\n", f"\n{mark}")


def main(
    fd: int,
    page_fd: int,
    mode: SandboxMode,
    factory: Callable[[Load, Callable[[Frame], None]], Backend] | None = None,
) -> None:
    """Serves the socket `fd` until the server closes it or says Stop; never returns.

    `page_fd` is the memory in which the server finds what this process was working on.
    `factory` opens another backend than llama.cpp; it is called inside the sandbox.
    """
    # Before the sandbox, which denies to change it.
    _end_with_parent()
    _no_core_file()
    # The server asks for it before it ends a worker that is stuck.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    page = SuspectsPage(page_fd)
    os.close(page_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO)
    logging.getLogger().handlers[0].setFormatter(_Marked("%(name)s: %(message)s"))
    code = 0
    try:
        _serve(socket.socket(fileno=fd), page, mode, factory)
    except BaseException:
        log.exception("the I/O thread failed")
        code = 1
    # Other threads may be inside llama.cpp: the kernel takes everything back at once.
    os._exit(code)


def _serve(
    sock: socket.socket,
    page: SuspectsPage,
    mode: SandboxMode,
    factory: Callable[[Load, Callable[[Frame], None]], Backend] | None,
) -> None:
    # The first frame names the files that the sandbox leaves.
    first = read_first(sock)
    if not isinstance(first, Load | Probe):
        return  # the server wants nothing, or is gone
    from .sandbox import confine

    confined = confine(first, mode)
    sock.sendall(encode(confined))
    if mode is SandboxMode.REQUIRE and confined.state is not SandboxState.ON:
        sock.sendall(encode(Failed(SandboxUnavailable(confined.problem).to_record())))
        return
    # Not before: it imports numpy, which starts threads, and threads that run already stay free.
    from .process import Worker, load_llama

    # A busy Python thread costs the owner half its speed at the default of 5 ms.
    sys.setswitchinterval(0.0002)
    Worker(sock, factory or load_llama, page=page).run(first)
