"""What worker processes hold, read where nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from .executor import ModelExecutor


async def memory_of(executors: Iterable[ModelExecutor]) -> dict[ModelExecutor, int]:
    """Bytes of each one's process, 0 where the system does not tell.

    In another thread: the kernel walks a process's pages, which takes milliseconds for a large one.
    """
    found = [*executors]
    if not found:
        return {}
    return await asyncio.to_thread(lambda: {executor: executor.memory_bytes for executor in found})
