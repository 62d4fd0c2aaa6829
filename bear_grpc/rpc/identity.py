"""Who calls, as the connection tells it: a client certificate, or a socket that only some can open."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from ..access.caller import Caller
from ..access.certificates import Identities, names_of
from .call import current_call
from .calls import wrapped

# Whoever can open a trusted socket.
LOCAL = Caller(id="local", tenant="unix")


class Certified(grpc.aio.ServerInterceptor):
    """Sets the caller of a call whose client certificate has a known name. Stands inside `Calls`.

    What a key says comes later, and wins. Names that are not known leave the caller anonymous.
    """

    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        return None if handler is None else wrapped(handler, self._around)

    def _around(self, behaviour: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def run(request: Any, context: Any) -> Any:
            caller = self._identities.caller_of(names_of(context.auth_context()))
            if caller is not None:
                current_call(context).caller = caller
            return await behaviour(request, context)

        return run


class Trusted(grpc.aio.ServerInterceptor):
    """Every call is `LOCAL`'s: the mode of the socket says who may connect."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        return None if handler is None else wrapped(handler, self._around)

    def _around(self, behaviour: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def run(request: Any, context: Any) -> Any:
            current_call(context).caller = LOCAL
            return await behaviour(request, context)

        return run
