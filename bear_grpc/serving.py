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
from typing import Any

from .config import EXIT_CONFIG, ConfigError, ServerConfig
from .errors import BearError
from .executor.spawner import Spawner
from .hangups import Hangups
from .reload import Reloads
from .server import Server
from .telemetry.logs import Logs

log = logging.getLogger(__name__)

EXIT_START = 1
NICE_OF_SERVER = 10


def serve(config: ServerConfig, reread: Callable[[], ServerConfig], hangups: Hangups) -> int:
    """Runs a server until SIGTERM or SIGINT; gives the exit code. A second signal ends at once.

    At SIGHUP, once it has started, it takes over what `reread` gives, also for those that `hangups` kept.
    When the terminal that it was started from is closed, SIGHUP ends it.
    """
    logs = Logs(config)
    spawner = Spawner(config.sandbox)
    _lower_priority()
    logs.open()
    try:
        return asyncio.run(_serve(config, spawner, reread, hangups))
    finally:
        spawner.close()
        logs.close()


def _lower_priority() -> None:
    """Puts this thread, and those it starts, behind the workers: they wait for each
    other at every barrier, and a busy neighbour would cost them half their speed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICE_OF_SERVER)


async def _reload_when_told(
    reloads: Reloads, reread: Callable[[], ServerConfig], told: asyncio.Event
) -> None:
    """One after the other; what is told several times during one is one more."""
    while True:
        await told.wait()
        told.clear()
        await reloads.reload(reread)


async def _serve(
    config: ServerConfig, spawner: Spawner, reread: Callable[[], ServerConfig], hangups: Hangups
) -> int:
    stopping, reload_told = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            # Workers die with the spawner thread, or see the closed socket.
            os._exit(128 + signal.SIGTERM)
        log.info("stopping; a second signal ends at once")
        stopping.set()

    def on_hangup() -> None:
        if hangups.terminal_is_closed:
            on_signal()
        else:
            reload_told.set()

    loop = asyncio.get_running_loop()
    for number, handler in (
        (signal.SIGTERM, on_signal),
        (signal.SIGINT, on_signal),
        (signal.SIGHUP, on_hangup),
    ):
        loop.add_signal_handler(number, handler)
    if hangups.came:
        on_hangup()
    server = Server(config, spawner)
    starting = asyncio.create_task(server.start())
    signalled = asyncio.create_task(stopping.wait())
    tasks: set[asyncio.Task[Any]] = {starting, signalled}
    try:
        await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            # What is there now stays: a full collection would halt every stream for as long as it takes to
            # walk through it (15 ms).
            gc.freeze()
            # Before, what is read anew has nothing to be compared with.
            tasks.add(asyncio.create_task(_reload_when_told(server.reloads, reread, reload_told)))
            await stopping.wait()
    except ConfigError as exc:
        log.error("%s", exc)
        return EXIT_CONFIG
    except BearError as exc:
        log.error("the server cannot start: %s [%s]", exc, exc.reason)
        return EXIT_START
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await server.stop()
    return 0
