"""Domain errors to gRPC statuses, once for all servicers. The only file that names StatusCode."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from .. import errors
from .call import id_of_request, may_know, note_error

log = logging.getLogger(__name__)

DOMAIN = "bear_grpc"

# A status travels in the trailers, and gRPC drops those that come near 8 KiB. The message is sent
# twice. What a client sent may be part of all of these.
MAX_MESSAGE_BYTES = 512
MAX_VALUE_BYTES = 256
MAX_FIELD_BYTES = 100
MAX_VIOLATIONS = 12
Code = grpc.StatusCode
T = TypeVar("T")
# Codes that tell of a failure of the server's, not of the caller's.
SERVER_FAULTS = frozenset(
    code.name
    for code in (
        Code.UNKNOWN,
        Code.DEADLINE_EXCEEDED,
        Code.UNIMPLEMENTED,
        Code.INTERNAL,
        Code.UNAVAILABLE,
        Code.DATA_LOSS,
    )
)
_NAMES: dict[int, str] = {code.value[0]: code.name for code in Code}
_NUMBERS = {name: number for number, name in _NAMES.items()}

CODES: dict[type[errors.BearError], grpc.StatusCode] = {
    errors.InvalidField: Code.INVALID_ARGUMENT,
    errors.ContextLengthExceeded: Code.INVALID_ARGUMENT,
    errors.GrammarInvalid: Code.INVALID_ARGUMENT,
    errors.ModelNotFound: Code.NOT_FOUND,
    errors.ModelFileNotFound: Code.NOT_FOUND,
    errors.ModelNotLoaded: Code.FAILED_PRECONDITION,
    errors.ModelAlreadyLoaded: Code.FAILED_PRECONDITION,
    errors.ModelInUse: Code.FAILED_PRECONDITION,
    errors.ModelExists: Code.ALREADY_EXISTS,
    errors.ModelFileInvalid: Code.FAILED_PRECONDITION,
    errors.ModelOutputInvalid: Code.FAILED_PRECONDITION,
    errors.RequestIdInUse: Code.ALREADY_EXISTS,
    errors.LoadConflict: Code.ABORTED,
    errors.ConstraintDeadEnd: Code.ABORTED,
    errors.RequestQuarantined: Code.FAILED_PRECONDITION,
    errors.KeyMissing: Code.UNAUTHENTICATED,
    errors.KeyInvalid: Code.UNAUTHENTICATED,
    errors.ScopeMissing: Code.PERMISSION_DENIED,
    errors.ModelDenied: Code.PERMISSION_DENIED,
    errors.PathNotAllowed: Code.PERMISSION_DENIED,
    errors.QueueFull: Code.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: Code.RESOURCE_EXHAUSTED,
    errors.SlowConsumer: Code.RESOURCE_EXHAUSTED,
    errors.ConstraintTooCostly: Code.RESOURCE_EXHAUSTED,
    errors.InsufficientMemory: Code.RESOURCE_EXHAUSTED,
    errors.Draining: Code.UNAVAILABLE,
    errors.WorkerCrashed: Code.UNAVAILABLE,
    errors.ModelUnloaded: Code.UNAVAILABLE,
    errors.PullCancelled: Code.ABORTED,
    errors.HubAccessDenied: Code.PERMISSION_DENIED,
    errors.DiskFull: Code.RESOURCE_EXHAUSTED,
    errors.HubRateLimited: Code.RESOURCE_EXHAUSTED,
    errors.DeadlineUnreachable: Code.DEADLINE_EXCEEDED,
    errors.LoadCooldown: Code.UNAVAILABLE,
    errors.HubUnreachable: Code.UNAVAILABLE,
    errors.ChecksumMismatch: Code.DATA_LOSS,
    errors.HubAnswerInvalid: Code.DATA_LOSS,
    errors.BackendError: Code.INTERNAL,
    errors.EngineStartFailed: Code.INTERNAL,
    errors.SandboxUnavailable: Code.FAILED_PRECONDITION,
    errors.FeatureUnsupported: Code.UNIMPLEMENTED,
}


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, with dots where something is left out."""
    data = text.encode()
    return text if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "..."


def _bad_request(violations: Sequence[errors.FieldViolation]) -> error_details_pb2.BadRequest:
    shown = [
        error_details_pb2.BadRequest.FieldViolation(
            field=_cut(v.field, MAX_FIELD_BYTES), description=_cut(v.description, MAX_FIELD_BYTES)
        )
        for v in violations[:MAX_VIOLATIONS]
    ]
    if len(violations) > MAX_VIOLATIONS:
        more = f"and {len(violations) - MAX_VIOLATIONS} more"
        shown.append(error_details_pb2.BadRequest.FieldViolation(field="...", description=more))
    return error_details_pb2.BadRequest(field_violations=shown)


def to_status(error: errors.BearError) -> Any:
    """The gRPC status of an error, with ErrorInfo and the details a program can act on."""
    metadata = {key: _cut(value, MAX_VALUE_BYTES) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    details: list[Any] = [info]
    if error.violations:
        details.append(_bad_request(error.violations))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, errors.NotFound | errors.ModelExists):
        name = metadata.get("model") or metadata.get("path", "")
        details.append(error_details_pb2.ResourceInfo(resource_type="bear_grpc.v1.Model", resource_name=name))
    if isinstance(error, errors.ModelNotLoaded):
        violation = error_details_pb2.PreconditionFailure.Violation(
            type="MODEL_LOADED", subject=error.metadata["model"], description="LoadModel loads it"
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[violation]))
    if isinstance(error, errors.QuotaExceeded):
        used_up = error_details_pb2.QuotaFailure.Violation(
            subject=metadata["subject"], description=f"{metadata['quota']}: {metadata['limit']}"
        )
        details.append(error_details_pb2.QuotaFailure(violations=[used_up]))
    status = status_pb2.Status(
        code=CODES[type(error)].value[0], message=_cut(error.message, MAX_MESSAGE_BYTES)
    )
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def _discreet(error: errors.BearError) -> errors.BearError:
    """The error without the names of models that the caller may not know of."""
    if not isinstance(error, errors.ModelNotFound):
        return error
    near = [name for name in error.metadata["nearest"].split(",") if name]
    return errors.ModelNotFound(error.metadata["model"], [name for name in near if may_know(name)])


def _unexpected(what: str) -> errors.BackendError:
    """Logs the exception that is being handled under the request's id; gives the error that tells the id."""
    request_id = id_of_request()
    log.exception("%s, request %s", what, request_id)
    return errors.BackendError(
        f"internal error; the server's log has the cause, under request {request_id}",
        metadata={"request_id": request_id},
    )


async def abort(context: Any, error: errors.BearError) -> NoReturn:
    """Ends the call with the error's status."""
    note_error(error.reason)
    # A client that does not read lets the status wait: the frames that raised the error, with all that they
    # hold of the call, must not wait with it.
    error.__traceback__ = error.__context__ = error.__cause__ = None
    # On grpc.aio's context, though its abstract base does not name it.
    await context.abort_with_status(to_status(error))
    raise AssertionError("abort_with_status returned")


async def abort_not_found(context: Any) -> NoReturn:
    """Ends a call as a protocol that is not ours wants it, without a reason."""
    await context.abort(Code.NOT_FOUND)
    raise AssertionError("abort returned")


def code_of(context: Any) -> str:
    """The name of the code that a call has ended with."""
    code = context.code()
    if code is None:
        return Code.OK.name
    return code.name if isinstance(code, Code) else _NAMES.get(code, Code.UNKNOWN.name)


def number_of(code: str) -> int:
    """The number of a code by its name, as it is on the wire."""
    return _NUMBERS[code]


def answer(method: Callable[..., Awaitable[T]]) -> Any:
    """Wraps a servicer's coroutine method, unary or writing to its context.

    The result has no type: the generated bases know no coroutine that writes.

    Our errors become their status; what is unexpected becomes INTERNAL with the
    request's id in place of its text; cancellation by gRPC goes on as it came.
    """

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> T:
        try:
            return await method(self, request, context)
        except errors.BearError as exc:
            if type(exc) not in CODES:
                exc = _unexpected(f"{type(exc).__name__} has no status")
            await abort(context, _discreet(exc))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the client left, its deadline passed, or the server stops
            # A cancellation of our own would end the call without any status.
            await abort(context, _unexpected(f"{method.__name__} was cancelled from inside"))
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # the status is set, or the peer is gone
        except Exception:
            await abort(context, _unexpected(f"{method.__name__} failed"))

    return call
