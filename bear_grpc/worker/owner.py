"""The owner thread: the only one that touches the llama.cpp context."""

from __future__ import annotations

import collections
import logging
import os
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items

from ..backend.base import Backend
from ..engine.cost import CostModel
from ..engine.engine import Engine, EngineSettings
from ..engine.sequence import Sequence
from ..errors import BearError
from ..protocol import Cancel, Costs, Credit, Failed, Frame, Load, Share
from ..types import CostTable, StepCost
from .exits import EXIT_BROKEN
from .opening import BackendFactory, known, open_measured, refined

log = logging.getLogger(__name__)

COSTS_INTERVAL_S = 60.0

Command = Sequence | Cancel | Credit | Share


class Owner(threading.Thread):
    """Loads the model, then serves commands and steps until the process ends."""

    def __init__(
        self,
        load: Load,
        factory: BackendFactory,
        *,
        post: Callable[[Frame], None],
        on_ready: Callable[[Backend, Engine], None],
        on_failed: Callable[[], None],
        mark: Callable[[Items[int]], None] = lambda ids: None,
    ) -> None:
        """`mark` is the engine's: it gets the ids of the sequences of each step."""
        super().__init__(name="owner", daemon=True)
        self._load = load
        self._factory = factory
        self._post = post
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._mark = mark
        self._changed = threading.Condition()
        self._commands: collections.deque[Command] = collections.deque()
        self._costs_due_s = time.monotonic() + COSTS_INTERVAL_S
        self._tables: list[CostTable] = []

    def put(self, command: Command) -> None:
        """Any thread: takes a command; it is served between two steps."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def run(self) -> None:
        try:
            self._serve()
        except BaseException:
            # Whatever it is, the context may be in any state: the process ends, and
            # the server tells every caller.
            log.exception("the owner thread failed")
            os._exit(EXIT_BROKEN)

    def _serve(self) -> None:
        try:
            backend, tables = open_measured(self._load, self._factory, self._post)
        except BearError as exc:
            self._post(Failed(exc.to_record()))
            self._on_failed()
            return
        self._tables = tables
        table = known(tables, self._load, backend.options)
        engine = self._make_engine(backend, table)
        self._on_ready(backend, engine)
        self._post(Costs(tables))
        worked = False
        while True:
            for command in self._take(engine, wait=not worked):
                self._apply(command, backend, engine)
            worked = engine.step()
            if table is not None and time.monotonic() >= self._costs_due_s:
                self._tell_costs(table, engine.costs())

    def _make_engine(self, backend: Backend, table: CostTable | None) -> Engine:
        load = self._load
        return Engine(
            backend,
            clock=time.monotonic,
            emit=self._post,
            settings=EngineSettings(
                stall_timeout_s=load.stall_timeout_s,
                step_target_s=load.step_target_s,
                share_prefixes=load.share_prefixes,
                aging_s=load.priority_aging_s,
                model=load.model,
                max_waiting_tokens=load.max_waiting_tokens,
            ),
            costs=CostModel(() if table is None else table.costs),
            mark=self._mark,
        )

    def _tell_costs(self, table: CostTable, costs: list[StepCost]) -> None:
        """Now and then, and only if something has changed: they are for the next load."""
        self._costs_due_s = time.monotonic() + COSTS_INTERVAL_S
        newer = refined(self._tables, table, costs)
        if newer != self._tables:
            self._tables = newer
            self._post(Costs(newer))

    def _take(self, engine: Engine, *, wait: bool) -> list[Command]:
        """All commands that have come; sleeps for one if there is nothing to compute."""
        with self._changed:
            if wait and not self._commands:
                self._changed.wait(engine.seconds_to_event())
            commands = list(self._commands)
            self._commands.clear()
        return commands

    def _apply(self, command: Command, backend: Backend, engine: Engine) -> None:
        match command:
            case Sequence():
                engine.submit(command)
            case Cancel():
                engine.cancel(command.id)
            case Credit():
                engine.add_credit(command.id, command.tokens)
            case Share():
                threads = backend.options.threads or self._load.cores
                engine.set_threads(max(1, min(threads, self._load.cores // command.busy_models)))
