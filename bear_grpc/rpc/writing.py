"""Messages to readers that may have stopped reading."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from google.protobuf.message import Message

from ..errors import SlowConsumer
from .call import note_write

# The worker ends a stalled generation after the stall time; the call's own end, which frees what is
# left of it here, comes later, so that a reader who comes back in between is told by the worker.
PATIENCE = 2


async def write(context: Any, message: Message, stall_timeout_s: float) -> None:
    """Sends one message of a stream. Raises SlowConsumer if the client's window stays full.

    The client still gets what was sent before.
    """
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE * stall_timeout_s) as limit:
            await context.write(message)
    except TimeoutError:
        if not limit.expired():
            raise
        raise SlowConsumer(stall_timeout_s) from None
    finally:
        note_write(time.monotonic() - began_s)
