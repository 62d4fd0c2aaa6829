"""Writes the calls that change a server into its audit log."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..access.audit import MAX_SUBJECT_CHARS, MAX_SUBJECTS, Entry, append
from ..access.caller import Scope
from ..access.policy import SCOPES
from ..access.refusals import Refusals
from .call import Call

log = logging.getLogger(__name__)

# Entries that wait for the disk. Above it they are lost, which the log says.
MAX_WAITING = 10_000
# Above it refused calls are only counted: they take no room from calls that changed something.
MAX_REFUSED_WAITING = 1_000
# Of a refused call fewer subjects are told: any key can ask for what it may not.
MAX_REFUSED_SUBJECTS = 4
# How often refused calls are looked after that were only counted.
PERIOD_S = 5.0
# What is still to be written at the end gets so long: a disk that hangs holds up no stop.
CLOSE_S = 5.0
_PREFIX = "/bear_grpc."
AUDITED = frozenset(
    method
    for method, scope in SCOPES.items()
    if scope in (Scope.MODELS_ADMIN, Scope.SERVER_ADMIN) and method.startswith(_PREFIX)
)


class AuditObserver:
    """A call observer. Its own thread writes; a write that fails is logged, and the call answered anyway.

    Calls without a valid key are left out: whoever reaches the port could fill the disk with them. Of calls
    that the scopes or models of a key refuse some are told, the others counted.
    """

    def __init__(self, state_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._state_dir = state_dir
        self._refusals = Refusals(clock)
        self._waiting: queue.Queue[Entry | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def begin(self, call: Call) -> None:
        pass

    def end(self, call: Call) -> None:
        if call.method not in AUDITED or not call.is_known:
            return
        entry = _entry_of(call)
        if not call.is_admitted:
            has_room = self._waiting.qsize() < MAX_REFUSED_WAITING
            if not self._refusals.is_told(entry, has_room=has_room):
                return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(entry)
        except queue.Full:
            log.error("not in the audit log, which is too slow: %s", entry)

    def close(self) -> None:
        """Returns when all is written, or CLOSE_S have passed; blocks. For after the last call."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        thread.join(CLOSE_S)
        if thread.is_alive():
            log.error("not in the audit log, whose disk does not answer: %d entries", self._waiting.qsize())

    def _write(self) -> None:
        is_open = True
        while is_open:
            entry = None
            with contextlib.suppress(queue.Empty):
                entry = self._waiting.get(timeout=None if self._refusals.is_empty else PERIOD_S)
                is_open = entry is not None
            for each in (entry, *self._refusals.due(at_once=not is_open)):
                if each is not None:
                    self._append(each)

    def _append(self, entry: Entry) -> None:
        try:
            append(self._state_dir, entry)
        except OSError as exc:
            log.error("not in the audit log (%s): %s", exc, entry)


def _entry_of(call: Call) -> Entry:
    subjects = call.subjects[: MAX_SUBJECTS if call.is_admitted else MAX_REFUSED_SUBJECTS]
    return Entry(
        action=call.method.rpartition("/")[2],
        actor=call.caller.id,
        tenant=call.caller.tenant,
        peer=call.peer,
        subjects=tuple(name[:MAX_SUBJECT_CHARS] for name in subjects),
        code=call.code,
        reason=call.reason,
        duration_s=round(call.ended_s - call.began_s, 3),
    )
