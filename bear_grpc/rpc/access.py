"""Who calls and whether they may: before a servicer sees the call, and for as long as it runs."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc.aio
import msgspec

from ..access.authentication import Authenticator, credential_of
from ..access.caller import Caller, tenant_of
from ..access.policy import OPEN, SCOPES
from ..access.slowing import FIRST_DELAY_S, Failures
from ..errors import BearError, KeyInvalid, KeyMissing, ModelDenied, ScopeMissing
from .audit import AUDITED
from .call import Call, current_call
from .calls import wrapped
from .health import MODEL_PREFIX
from .status import abort
from .subjects import SUBJECTS

log = logging.getLogger(__name__)

# Failed calls that wait for their answer, of all hosts. Above it answers come at once: waiting costs memory.
MAX_SLOWED = 256
Behaviour = Callable[..., Awaitable[Any]]


class Access(grpc.aio.ServerInterceptor):
    """Inside of `Calls`, and of what knows callers by their connection.

    With an authenticator a call needs a valid key, or a caller that is known already; the key is the one
    that counts. Without one, everybody is as they come. Either way scopes and models are checked.
    """

    def __init__(
        self, own_name: Callable[[str], str], authenticator: Authenticator | None, failures: Failures
    ) -> None:
        """`own_name` gives the name of the model that a name means."""
        self._own_name = own_name
        self._authenticator = authenticator
        self._failures = failures
        self._slowed = 0
        self._running: collections.defaultdict[str, set[asyncio.Timeout]] = collections.defaultdict(set)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        return wrapped(handler, lambda behaviour: self._around(behaviour, details.method))

    def end_invalid(self) -> None:
        """Ends the calls whose key has been revoked or has expired, with KEY_INVALID."""
        if self._authenticator is None:
            return
        now_s = asyncio.get_running_loop().time()
        for key_id in [key_id for key_id in self._running if not self._authenticator.is_valid(key_id)]:
            log.info("the calls of key %s end: it is no longer valid", key_id)
            for limit in self._running.pop(key_id):
                if not limit.expired():
                    limit.reschedule(now_s)

    def _around(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def run(request: Any, context: Any) -> Any:
            call = current_call(context)
            try:
                key_id = self._admit(call, method, request)
            except (KeyMissing, KeyInvalid) as exc:
                await self._slow(call.peer)
                await abort(context, exc)
            except BearError as exc:
                await abort(context, exc)
            call.is_admitted = True
            if not key_id:
                return await behaviour(request, context)
            try:
                async with asyncio.timeout(None) as limit:
                    with self._held(key_id, limit):
                        return await behaviour(request, context)
            except TimeoutError:
                if not limit.expired():
                    raise
                await abort(context, KeyInvalid())

        return run

    def _admit(self, call: Call, method: str, request: Any) -> str:
        """Sets the caller; gives the id of its key, if it came with one. Raises what refuses the call."""
        if method in AUDITED:
            call.subjects = _subjects(method, request)
        key_id = ""
        problem: BearError | None = None
        if self._authenticator is not None:
            credential = credential_of(call.metadata)
            caller = None if credential is None else self._authenticator.caller_of(credential)
            if caller is not None:
                call.caller, key_id = caller, caller.id
            elif credential is not None or not call.caller.id:
                problem = KeyMissing() if credential is None else KeyInvalid()
                call.caller = nobody(call.caller)
        call.is_known = problem is None
        if method in OPEN:
            self._check_health(call.caller, request, problem)
            return key_id
        if problem is not None:
            raise problem
        scope = SCOPES.get(method)
        if scope is None:
            log.error("%s is in no policy and is refused", method)
            raise ScopeMissing(method, "")
        if not call.caller.may(scope):
            raise ScopeMissing(method, scope)
        if call.caller.models is not None and method in SUBJECTS:
            for name in SUBJECTS[method](request):
                self._check_model(call.caller, name)
        return key_id

    def _check_model(self, caller: Caller, name: str) -> None:
        """An empty name is the servicer's to refuse."""
        if name and not caller.may_use(self._own_name(name)):
            raise ModelDenied(name)

    def _check_health(self, caller: Caller, request: Any, problem: BearError | None) -> None:
        """The server's own health is for everybody, that of a model for those who may use the model."""
        service = getattr(request, "service", "")
        if service.startswith(MODEL_PREFIX) and caller.models is not None:
            if problem is not None:
                raise problem
            name = service.removeprefix(MODEL_PREFIX)
            if not caller.may_use(self._own_name(name)):
                raise ModelDenied(name)

    @contextlib.contextmanager
    def _held(self, key_id: str, limit: asyncio.Timeout) -> Iterator[None]:
        self._running[key_id].add(limit)
        try:
            yield
        finally:
            running = self._running.get(key_id)
            if running is not None:
                running.discard(limit)
                if not running:
                    del self._running[key_id]

    async def _slow(self, peer: str) -> None:
        """Waits as long as the host's failures so far make it wait."""
        host = tenant_of(peer)
        delay_s = self._failures.count(host)
        if delay_s == FIRST_DELAY_S:
            log.warning("calls from %s fail for want of a valid key: they are answered later and later", host)
        if not delay_s or self._slowed >= MAX_SLOWED:
            return
        self._slowed += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._slowed -= 1


def _subjects(method: str, request: Any) -> tuple[str, ...]:
    """For the audit log; of a request that the servicer will refuse there may be none."""
    try:
        return tuple(SUBJECTS[method](request)) if method in SUBJECTS else ()
    except (BearError, ValueError, AttributeError):  # the last: bytes, of a handler that unpacks them itself
        return ()


def nobody(caller: Caller) -> Caller:
    """The same caller, who may do nothing."""
    return msgspec.structs.replace(caller, scopes=frozenset(), models=())
