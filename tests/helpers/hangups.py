"""`bear` that gets a SIGHUP at a moment of its start which no other process could hit.

`python -m tests.helpers.hangups MOMENT COMMAND...`, where the command is that of `bear`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.abc
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from bear_grpc.cli import main

SERVER = "bear_grpc.serving"
# What a reload does at once it does within this time.
RELOAD_S = 0.5
CLOSES_WITHIN_S = 30.0


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


class WhenImported(importlib.abc.MetaPathFinder):
    """Acts when the server is about to be imported, and finds nothing."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == SERVER:
            self._act()


def wait_for_the_end() -> None:
    """Whoever reads this may close the terminal."""
    print("imports", flush=True)
    time.sleep(CLOSES_WITHIN_S)


def hang_up_before_the_models_are_known() -> None:
    from bear_grpc.models.shelf import Shelf

    open_shelf = Shelf.open

    async def open_late(self: Shelf) -> None:
        hang_up()
        known = asyncio.Event()
        self.feed.listen(lambda status: known.set())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELOAD_S):
                await known.wait()
        await open_shelf(self)

    Shelf.open = open_late  # type: ignore[method-assign]


if __name__ == "__main__":
    match sys.argv[1]:
        case "imports":
            sys.meta_path.insert(0, WhenImported(hang_up))
        case "closed":
            sys.meta_path.insert(0, WhenImported(wait_for_the_end))
        case "models":
            hang_up_before_the_models_are_known()
    # The command: an interpreter, -m and the module come before what it is asked.
    sys.argv = ["bear", *sys.argv[5:]]
    main()
