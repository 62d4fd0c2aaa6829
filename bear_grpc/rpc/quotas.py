"""Holds calls of inference to the quotas of who calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from ..access.quotas import NO_QUOTAS, Limiter
from ..errors import QuotaExceeded
from .call import current_call
from .calls import wrapped
from .status import abort

_INFERENCE = "/bear_grpc.v1.InferenceService/"
_GENERATIONS = (_INFERENCE + "Generate", _INFERENCE + "GenerateOnce")


class QuotaGuard(grpc.aio.ServerInterceptor):
    """Stands inside of `Access`, which finds out who calls. Quotas are of inference only."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_INFERENCE):
            return handler
        generates = details.method in _GENERATIONS
        return wrapped(handler, lambda behaviour: self._around(behaviour, generates))

    def _around(self, behaviour: Callable[..., Any], generates: bool) -> Callable[..., Awaitable[Any]]:
        async def run(request: Any, context: Any) -> Any:
            call = current_call(context)
            if call.caller.quotas == NO_QUOTAS:
                return await behaviour(request, context)
            try:
                admitted = self._limiter.admit(call.caller, generates=generates)
            except QuotaExceeded as exc:
                await abort(context, exc)
            call.on_tokens = admitted.charge
            try:
                return await behaviour(request, context)
            finally:
                admitted.charge(call.usage.prompt_tokens + call.drawn_tokens - admitted.charged)
                admitted.release()

        return run
