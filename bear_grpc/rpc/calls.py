"""Every call from its beginning to its end, for those who count, log and measure."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from .call import Call, identify, set_current
from .status import code_of

log = logging.getLogger(__name__)


class CallObserver(Protocol):
    """Is told of every call, on the event loop; must not block or raise."""

    def begin(self, call: Call) -> None:
        """It has come; nobody knows yet who calls."""

    def end(self, call: Call) -> None:
        """It has ended, however."""


class Calls(grpc.aio.ServerInterceptor):
    """The outermost interceptor: makes the `Call` of every call, and tells the observers of it."""

    def __init__(self) -> None:
        self._observers: list[CallObserver] = []

    def add(self, observer: CallObserver) -> None:
        """It is told of every call that comes from now on."""
        self._observers.append(observer)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        call = Call(details.method, dict(details.invocation_metadata or ()))
        set_current(call)
        handler = await continuation(details)
        return None if handler is None else wrapped(handler, lambda behaviour: self._around(behaviour, call))

    def _around(self, behaviour: Callable[..., Any], call: Call) -> Callable[..., Awaitable[Any]]:
        async def run(request: Any, context: Any) -> Any:
            set_current(call)
            identify(call, context)
            self._tell("begin", call)
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                call.code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
                raise
            except grpc.aio.InternalError:
                # Nobody is there for the message or the status: gRPC would log a traceback of it.
                call.code = "CANCELLED"
                raise asyncio.CancelledError("the client is gone") from None
            except Exception:
                # gRPC answers UNKNOWN where no code is set, and tells the context nothing of it.
                if code_of(context) == "OK":
                    call.code = "UNKNOWN"
                raise
            finally:
                call.code = call.code or code_of(context)
                call.ended_s = time.monotonic()
                self._tell("end", call)

        return run

    def _tell(self, what: str, call: Call) -> None:
        for observer in self._observers:
            try:
                getattr(observer, what)(call)
            except Exception:
                log.exception("%s of %s failed", what, type(observer).__name__)


def wrapped(handler: Any, around: Callable[[Callable[..., Any]], Callable[..., Awaitable[Any]]]) -> Any:
    """A method handler with `around` its behaviour, which it sees as a coroutine that may write."""
    for requests, responses in ((False, False), (False, True), (True, False), (True, True)):
        if (handler.request_streaming, handler.response_streaming) == (requests, responses):
            kind = f"{'stream' if requests else 'unary'}_{'stream' if responses else 'unary'}"
            make = getattr(grpc, f"{kind}_rpc_method_handler")
            behaviour = around(_as_coroutine(getattr(handler, kind)))
            return make(behaviour, handler.request_deserializer, handler.response_serializer)
    raise AssertionError("a handler has streams or not")


def _as_coroutine(behaviour: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def run(request: Any, context: Any) -> Any:
        made = behaviour(request, context)
        if not inspect.isasyncgen(made):
            return await made
        # A generator that gRPC iterates would be closed late or never.
        async with contextlib.aclosing(made) as messages:
            async for message in messages:
                await context.write(message)

    return run
