"""What the machine of a model's life needs besides a manager: threads that are none, requests, reasons."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from tests.helpers.lifecycle import FakeExecutor


class InlinePool(concurrent.futures.ThreadPoolExecutor):
    """Runs what it is given at once: no thread decides in which order things happen."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as exc:
            future.set_exception(exc)
        return future


class Reasons(logging.Handler):
    """Why the server unloads models of its own accord, by model."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "%s is unloaded: %s":
            name, why = record.args
            self.last[name] = why


@dataclasses.dataclass(eq=False)
class Request:
    """One that runs on a model, or waits for it."""

    name: str
    keep_alive_s: float | None
    release: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    executor: FakeExecutor | None = None
    task: asyncio.Task[None] | None = None
    endings: int = 0
