"""One model's download, as everybody on the event loop sees it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator

from ..store.listing import Resolved
from ..store.reference import Reference
from ..types import PullProgress, PullStage


@dataclasses.dataclass(slots=True, eq=False)
class Download:
    """One model's download. `changed` is set anew at every step. Event loop only."""

    name: str
    reference: Reference
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    stopped: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    resolved: Resolved | None = None
    progress: PullProgress = dataclasses.field(default_factory=lambda: PullProgress(PullStage.QUEUED))
    changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        """Wakes everybody who watches."""
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self) -> None:
        """Has it stop: in its thread, or while it waits for its turn."""
        self.stop.set()
        self.stopped.set()

    async def watch(self) -> AsyncGenerator[PullProgress, None]:
        """Its progress from now on, the latest when the reader is late. Raises what the download raises.

        Leaving does not stop it.
        """
        assert self.task is not None
        last: PullProgress | None = None
        while not self.task.done():
            changed = self.changed
            if self.progress is not last:
                last = self.progress
                yield last
            else:
                await changed.wait()
        self.task.result()
