"""What a call raises: the server's own errors as the classes of `bear_grpc.errors`, and the four below.

The four are for statuses that no bear_grpc server worded: the connection, the caller's deadline, a proxy.
Every error that comes from a call has a `code`, the name of the gRPC status code.
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from bear_grpc.errors import BearError, ErrorRecord, FieldViolation, from_record

DOMAIN = "bear_grpc"


class CallError(BearError):
    """A call ended with a status that carries none of the server's own reasons."""

    code: ClassVar[str] = "UNKNOWN"


class ServerUnreachable(CallError):
    """No server answers at the target, or the connection to it broke."""

    reason = "SERVER_UNREACHABLE"
    code = "UNAVAILABLE"


class CallCancelled(CallError):
    """The call was cancelled, here or by something on the way."""

    reason = "CALL_CANCELLED"
    code = "CANCELLED"


class DeadlinePassed(CallError):
    """The call's timeout passed before it ended."""

    reason = "DEADLINE_PASSED"
    code = "DEADLINE_EXCEEDED"


class CallFailed(CallError):
    """The call ended with another status; `code` tells which."""

    reason = "CALL_FAILED"


def translate(failed: grpc.RpcError, target: str) -> BearError:
    """The exception to raise for a failed call to `target`."""
    code = failed.code()
    details = failed.details() or ""
    record = _record(failed, details)
    error = _unworded(code, details, target) if record is None else from_record(record)
    error.code = code.name  # type: ignore[attr-defined]  # errors.py knows nothing of gRPC
    return error


def _unworded(code: grpc.StatusCode, details: str, target: str) -> CallError:
    if code is grpc.StatusCode.UNAVAILABLE:
        if details.startswith(("failed to connect", "errors resolving")):
            return ServerUnreachable(_unreachable(details, target))
        return ServerUnreachable(f"the connection to {target} failed: {details}")
    if code is grpc.StatusCode.CANCELLED:
        return CallCancelled("the call was cancelled")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlinePassed(f"no answer from {target} in time")
    return CallFailed(f"{details or 'the call failed'} ({code.name})")


def _unreachable(details: str, target: str) -> str:
    # gRPC names each layer; the last part is the system's own words.
    cause = details.removesuffix(": OK").rpartition(": ")[2].rstrip("]")
    if "WRONG_VERSION_NUMBER" in details:
        return f"the server at {target} does not speak TLS"
    if "handshake failed" in details or "Hostname Verification" in details:
        return f"the certificate of {target} is not trusted: {cause}"
    if cause == "Socket closed":
        cause += "; it may speak TLS, or ask for another client certificate"
    return f"no server answers at {target}: {cause}"


def _record(failed: grpc.RpcError, details: str) -> ErrorRecord | None:
    """What the server said in `grpc-status-details-bin`; None without an ErrorInfo of ours."""
    try:
        status = rpc_status.from_call(failed)  # type: ignore[arg-type]
    except (ValueError, DecodeError):  # details that contradict the status: not to be trusted
        return None
    info = error_details_pb2.ErrorInfo()
    if status is None or not _take(status, info) or info.domain != DOMAIN:
        return None
    bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    _take(status, bad_request)
    return ErrorRecord(
        reason=info.reason,
        message=status.message or details,
        metadata=dict(info.metadata),
        violations=[FieldViolation(v.field, v.description) for v in bad_request.field_violations],
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if _take(status, retry) else None,
    )


def _take(
    status: status_pb2.Status,
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> bool:
    """Unpacks the detail of this type into `message`; False when there is none."""
    return any(detail.Unpack(message) for detail in status.details)
