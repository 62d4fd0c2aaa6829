"""Starts a model's worker again after it has died, until it lives or dies too often."""

from __future__ import annotations

import asyncio
import logging
import time

from ..errors import BackendError, BearError, EngineStartFailed, ModelUnloaded, WorkerCrashed
from ..executor.executor import ModelExecutor
from ..protocol import Ready
from ..types import ModelState, StateReason
from .clock import Clock, pause
from .cooldown import Cooldown
from .entry import ModelEntry
from .eviction import Room
from .shelf import Shelf

log = logging.getLogger(__name__)

# The first one is immediate; then the pauses double.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
MOST_DEATHS = 5  # without one finished request between
MOST_FAILED_LOADS = 3


class CrashLoop(Exception):
    """The worker dies again and again."""


def pause_s(deaths: int) -> float:
    """How long to wait after so many deaths in a row."""
    return 0.0 if deaths <= 1 else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(deaths - 2, 16))


class Restarts:
    """Event loop only. `begin`, then `run` in a task of its own."""

    def __init__(self, shelf: Shelf, room: Room, cooldown: Cooldown, clock: Clock) -> None:
        self._shelf = shelf
        self._room = room
        self._cooldown = cooldown
        self._clock = clock

    def begin(self, entry: ModelEntry, how: str) -> None:
        """Moves a model whose worker has died to LOADING; `how` is the report."""
        self._shelf.move(entry, ModelState.LOADING, StateReason.RESTARTING, how)

    async def run(self, entry: ModelEntry, executor: ModelExecutor) -> None:
        """Ends in READY; else in FAILED, or in AVAILABLE when it is cancelled, and raises the cause.

        The requests of the executor go on, or have their ending then. Cancelling it raises ModelUnloaded.
        """
        began = time.monotonic()
        how = entry.message
        try:
            ready = await self._until_live(entry, executor)
        except asyncio.CancelledError:
            self._shelf.move(entry, ModelState.AVAILABLE)
            executor.give_up(ModelUnloaded(entry.name))
            raise ModelUnloaded(entry.name) from None
        except CrashLoop as exc:
            self._cooldown.failed(entry.name)
            raise self._give_up(entry, executor, StateReason.CRASH_LOOP, f"{exc}; {how}") from exc
        except BearError as exc:
            self._cooldown.failed(entry.name)
            raise self._give_up(entry, executor, StateReason.WORKER_CRASHED, f"{how}; {exc.message}") from exc
        except Exception as exc:
            log.exception("restarting %s failed", entry.name)
            self._give_up(entry, executor, StateReason.WORKER_CRASHED, how)
            raise BackendError("the restart failed") from exc
        entry.ready, entry.load_seconds = ready, time.monotonic() - began
        self._shelf.move(entry, ModelState.READY)
        log.info("%s is ready again after %.2f s", entry.name, entry.load_seconds)

    async def _until_live(self, entry: ModelEntry, executor: ModelExecutor) -> Ready:
        failed = 0
        while True:
            if executor.deaths >= MOST_DEATHS:
                raise CrashLoop(f"the worker has died {executor.deaths} times without finishing a request")
            await pause(self._clock, pause_s(executor.deaths + failed))
            try:
                async with self._room.kept_for(entry):
                    return await executor.restart()
            except EngineStartFailed as exc:
                failed += 1
                log.warning("restarting %s: %s", entry.name, exc)
                if failed >= MOST_FAILED_LOADS:
                    raise CrashLoop(f"the worker has died {failed} times while loading") from exc

    def _give_up(
        self, entry: ModelEntry, executor: ModelExecutor, reason: StateReason, message: str
    ) -> WorkerCrashed:
        self._shelf.move(entry, ModelState.FAILED, reason, message)
        error = WorkerCrashed(entry.name, message.partition("\n")[0])
        executor.give_up(error)
        return error
