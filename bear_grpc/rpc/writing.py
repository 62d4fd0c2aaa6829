"""Messages to readers that may have stopped reading."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, Self

from google.protobuf.message import Message

from ..errors import SlowConsumer
from .call import note_write

# The worker ends a stalled generation after the stall time; the call's own end, which frees what is
# left of it here, comes later, so that a reader who comes back in between is told by the worker.
PATIENCE = 2


class Writer:
    """Sends the messages of one stream, from one task. A context manager.

    Its timer is left running from message to message, and looks when it fires whether one of them waits:
    a timer for each would be most of what a token costs here.
    """

    def __init__(self, context: Any, stall_timeout_s: float) -> None:
        self._context = context
        self._stall_timeout_s = stall_timeout_s
        self._loop = asyncio.get_running_loop()
        self._began_s: float | None = None  # of the message under way, CLOCK_MONOTONIC
        self._timer: asyncio.TimerHandle | None = None
        self._is_stalled = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def write(self, message: Message) -> None:
        """Sends one message. Raises SlowConsumer if the client's window stays full.

        The client still gets what was sent before.
        """
        began_s = self._began_s = time.monotonic()
        if self._timer is None:
            self._watch(PATIENCE * self._stall_timeout_s)
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            # Somebody else may have cancelled the task as well: that goes first.
            if self._is_stalled and self._task.uncancel() <= self._cancelling:
                raise SlowConsumer(self._stall_timeout_s) from None
            raise
        finally:
            self._began_s = None
            note_write(time.monotonic() - began_s)

    def _watch(self, for_s: float) -> None:
        self._timer = self._loop.call_later(for_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._began_s is None:
            return  # the next message starts it again
        left_s = self._began_s + PATIENCE * self._stall_timeout_s - time.monotonic()
        if left_s > 0:
            self._watch(left_s)
        else:
            self._is_stalled = True
            self._task.cancel()
