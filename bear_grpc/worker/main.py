"""The worker process's first instructions, in the order that they must have."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys

from ..suspects import SuspectsPage

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


def main(fd: int, page_fd: int) -> None:
    """Serves the socket `fd` until the server closes it or says Stop; never returns.

    `page_fd` is the memory in which the server finds what this process was working on.
    """
    _end_with_parent()
    # The server asks for it before it ends a worker that is stuck.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    page = SuspectsPage(page_fd)
    os.close(page_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # The sandbox belongs here: what follows imports numpy, which starts threads.
    from .process import Worker

    # A busy Python thread costs the owner half its speed at the default of 5 ms.
    sys.setswitchinterval(0.0002)
    code = 0
    try:
        Worker(socket.socket(fileno=fd), page=page).run()
    except BaseException:
        log.exception("the I/O thread failed")
        code = 1
    # Other threads may be inside llama.cpp: the kernel takes everything back at once.
    os._exit(code)
