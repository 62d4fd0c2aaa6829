"""The server as a process: its logs, its signals, its exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable

from .config import EXIT_CONFIG, ConfigError, ServerConfig
from .errors import BearError
from .executor.spawner import Spawner
from .server import Server
from .telemetry.logs import Logs

log = logging.getLogger(__name__)

EXIT_START = 1
NICE_OF_SERVER = 10


def serve(config: ServerConfig, reread: Callable[[], ServerConfig] | None = None) -> int:
    """Runs a server until SIGTERM or SIGINT; gives the exit code. A second signal ends at once.

    At SIGHUP it takes over what `reread` gives. When the terminal that it was started from is closed,
    SIGHUP ends it, as other programs.
    """
    logs = Logs(config)
    spawner = Spawner(config.sandbox)
    _lower_priority()
    logs.open()
    try:
        return asyncio.run(_serve(config, spawner, reread))
    finally:
        spawner.close()
        logs.close()


def _has_terminal() -> bool:
    """Whether this process has a terminal that could hang up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _lower_priority() -> None:
    """Puts this thread, and those it starts, behind the workers: they wait for each
    other at every barrier, and a busy neighbour would cost them half their speed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICE_OF_SERVER)


async def _serve(config: ServerConfig, spawner: Spawner, reread: Callable[[], ServerConfig] | None) -> int:
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            # Workers die with the spawner thread, or see the closed socket.
            os._exit(128 + signal.SIGTERM)
        log.info("stopping; a second signal ends at once")
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = Server(config, spawner)
    reloading: set[asyncio.Task[None]] = set()
    # Whoever starts it with nohup wants it to outlive its terminal.
    may_hang_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()

    def on_hangup() -> None:
        if may_hang_up and not _has_terminal():
            on_signal()
        elif reread is not None and not stopping.is_set():
            task = asyncio.create_task(server.reloads.reload(reread))
            reloading.add(task)
            task.add_done_callback(reloading.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    starting = asyncio.create_task(server.start())
    signalled = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            # What is there now stays: a full collection would halt every stream for as long as it takes to
            # walk through it (15 ms).
            gc.freeze()
            await stopping.wait()
    except ConfigError as exc:
        log.error("%s", exc)
        return EXIT_CONFIG
    except BearError as exc:
        log.error("the server cannot start: %s [%s]", exc, exc.reason)
        return EXIT_START
    finally:
        for task in (starting, signalled, *reloading):
            task.cancel()
        await asyncio.wait({starting, signalled, *reloading})
        await server.stop()
    return 0
