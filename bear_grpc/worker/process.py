"""The worker's three threads and what goes between them."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..backend.base import Backend
from ..engine.engine import Engine
from ..errors import BearError
from ..protocol import (
    Cancel,
    Credit,
    Failed,
    Frame,
    Heartbeat,
    Load,
    Probe,
    ProbeResult,
    Progress,
    Ready,
    Share,
    Stop,
    Submit,
    TextJob,
    ToWorker,
)
from ..suspects import SuspectsPage
from ..types import LoadStage
from .exits import EXIT_STUCK
from .io import Connection
from .opening import BackendFactory
from .owner import Owner
from .text import Preparer, TextThread

log = logging.getLogger(__name__)

TICK_S = 0.5


def _no_mark(_: object) -> None:
    """Where no page is shared, nobody will ask."""


def load_llama(load: Load, post: Callable[[Frame], None]) -> Backend:
    """The real backend; progress goes out as frames."""
    # Native code is loaded on the owner thread: the I/O thread stays alive meanwhile.
    from ..backend import llama, native

    native.start()
    return llama.LlamaBackend(
        Path(load.path),
        load.options,
        cores=load.cores,
        report=lambda stage, fraction: post(Progress(stage, fraction)),
    )


class Worker:
    """One model's process. `run` is the I/O thread; owner and text start with Load."""

    def __init__(
        self,
        sock: socket.socket,
        factory: BackendFactory = load_llama,
        page: SuspectsPage | None = None,
    ) -> None:
        self._page = page
        self._connection = Connection(sock)
        self._factory = factory
        self._owner: Owner | None = None
        self._text: TextThread | None = None
        self._engine: Engine | None = None

    def run(self, first: ToWorker | None = None) -> None:
        """Returns when the server has closed the socket, or said Stop and all is sent.

        `first` is a frame that was read already.
        """
        try:
            if first is not None:
                self._take(first)
            self._connection.run(self._take, self._tick, TICK_S)
        finally:
            if self._text is not None:
                self._text.close()

    def _take(self, frame: ToWorker) -> None:
        match frame:
            case Load():
                self._load(frame)
            case Probe():
                self._connection.post(probe(frame))
                self._connection.close_after_sending()
            case Stop():
                self._connection.close_after_sending()
            case Submit() | TextJob():
                self._ready_text().put(frame)
            case Cancel():
                self._cancel(frame)
            case Credit() | Share():
                self._ready_owner().put(frame)

    def _cancel(self, frame: Cancel) -> None:
        if not self._ready_text().cancel(frame.id):
            # In this order: an interrupted step must find the command.
            self._ready_owner().put(frame)
            assert self._engine is not None
            self._engine.interrupt(frame.id)

    def _load(self, frame: Load) -> None:
        post = self._connection.post
        post(Progress(LoadStage.STARTING, 0.0))
        self._owner = Owner(
            frame,
            self._factory,
            post=post,
            mark=_no_mark if self._page is None else self._page.mark_step,
            on_ready=functools.partial(self._on_ready, frame),
            on_failed=self._connection.close_after_sending,
        )
        self._owner.start()

    def _on_ready(self, load: Load, backend: Backend, engine: Engine) -> None:
        """Owner thread: the model is loaded, requests may come from now on."""
        assert backend.options.context_length is not None
        preparer = Preparer(
            backend.vocabulary,
            backend.options.context_length,
            load.chat_template,
            max_rendered_chars=load.max_rendered_chars,
        )
        preparer.warm_up()
        post = self._connection.post
        self._engine = engine
        self._text = TextThread(
            preparer,
            post=post,
            to_owner=self._ready_owner().put,
            limit_s=load.max_text_job_s,
            mark=_no_mark if self._page is None else self._page.mark_text,
        )
        self._text.launch()
        post(Ready(backend.info, backend.options, backend.kv_cache_bytes, backend.compute_bytes))

    def _tick(self) -> None:
        if self._text is not None:
            self._text.interrupt_overdue()
            if self._text.is_stuck():
                # Nobody else's text is served any more: a new process is better than this one.
                log.critical("a text job cannot be stopped: the worker ends")
                os._exit(EXIT_STUCK)
        engine = self._engine
        if engine is None:  # it loads: native code lets this thread run meanwhile
            self._connection.post(Heartbeat(0, 0.0))
        else:
            self._connection.post(Heartbeat(engine.steps, engine.step_age_s(), engine.step_predicted_s))

    def _ready_text(self) -> TextThread:
        if self._text is None:
            raise RuntimeError("a request came before the model was ready")
        return self._text

    def _ready_owner(self) -> Owner:
        if self._owner is None:
            raise RuntimeError("a command came before Load")
        return self._owner


def probe(frame: Probe) -> Frame:
    """What needs the native library without a model in it."""
    from ..backend import dry, native

    native.start()
    version, build = native.describe_build()
    result = ProbeResult(version, build, native.devices())
    if frame.path is None:
        return result
    path = Path(frame.path)
    try:
        result = msgspec.structs.replace(result, info=dry.inspect(path))
        if frame.options is not None:
            dry_run = dry.dry_run(path, frame.options, cores=frame.cores)
            result = msgspec.structs.replace(result, dry_run=dry_run)
    except BearError as exc:
        return Failed(exc.to_record())
    return result
