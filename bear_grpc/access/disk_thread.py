"""Work on a disk that may hang, beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class DiskThread:
    """Does one piece of work after another, in a thread of its own. Event loop only.

    What hangs holds up neither the loop nor the end of the process: Python waits for the threads of an
    executor when it ends, and for daemons it does not.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """What it gives or raises. Cancelling the future does not end the work."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[T] = loop.create_future()

        def tell(how: Callable[[Any], None], what: Any) -> None:
            if not told.done():
                how(what)

        def do() -> None:
            how: Callable[[Any], None] = told.set_result
            what: Any = None
            try:
                what = work()
            except Exception as exc:
                how, what = told.set_exception, exc
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(tell, how, what)

        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name=self._name, daemon=True)
            self._thread.start()
        self._work.put(do)
        return told

    async def close(self, last: Callable[[], None], timeout_s: float) -> bool:
        """Ends the thread with this piece of work; False if it has not come so far by then.

        Without a thread nothing is done."""
        if self._thread is None:
            return True
        told = self.run(last)
        self._work.put(None)
        done, _ = await asyncio.wait({told}, timeout=timeout_s)
        if done:
            told.result()
        else:
            told.cancel()
        return bool(done)

    def _follow(self) -> None:
        while (do := self._work.get()) is not None:
            do()
