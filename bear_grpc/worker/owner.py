"""The owner thread: the only one that touches the llama.cpp context."""

from __future__ import annotations

import collections
import logging
import os
import threading
import time
from collections.abc import Callable

from ..backend.base import Backend
from ..engine.cost import CostModel
from ..engine.engine import Engine, EngineSettings
from ..engine.sequence import Sequence
from ..errors import BearError
from ..protocol import Cancel, Costs, Credit, Failed, Frame, Load, Share
from ..types import CostTable
from .opening import BackendFactory, known, open_measured

log = logging.getLogger(__name__)

EXIT_BROKEN = 70  # EX_SOFTWARE of sysexits.h
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
    ) -> None:
        super().__init__(name="owner", daemon=True)
        self._load = load
        self._factory = factory
        self._post = post
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._changed = threading.Condition()
        self._commands: collections.deque[Command] = collections.deque()
        self._costs_due_s = time.monotonic() + COSTS_INTERVAL_S
        self._told_costs: CostTable | None = None

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
        engine = self._make_engine(backend, tables)
        self._on_ready(backend, engine)
        self._post(Costs(tables))
        worked = False
        while True:
            for command in self._take(engine, wait=not worked):
                self._apply(command, backend, engine)
            worked = engine.step()
            if not worked or time.monotonic() >= self._costs_due_s:
                self._tell_costs(engine)

    def _make_engine(self, backend: Backend, tables: list[CostTable]) -> Engine:
        table = known(tables, backend.options)
        return Engine(
            backend,
            clock=time.monotonic,
            emit=self._post,
            settings=EngineSettings(
                self._load.stall_timeout_s, self._load.step_target_s, self._load.share_prefixes
            ),
            costs=CostModel(() if table is None else table.costs),
        )

    def _tell_costs(self, engine: Engine) -> None:
        """Now and then, and only what has changed: they are for the next load."""
        if time.monotonic() < self._costs_due_s:
            return
        self._costs_due_s = time.monotonic() + COSTS_INTERVAL_S
        table = engine.cost_table()
        if table != self._told_costs:
            self._told_costs = table
            self._post(Costs([table]))

    def _take(self, engine: Engine, *, wait: bool) -> list[Command]:
        """All commands that have come; sleeps for one if there is nothing to compute."""
        with self._changed:
            if wait and not self._commands:
                self._changed.wait(engine.seconds_to_stall())
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
