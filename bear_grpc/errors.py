"""The errors of bear_grpc, on one screen. Knows nothing of gRPC.

    BearError
    ├── InvalidRequest                 the caller's input is wrong
    │   ├── InvalidField               one or more fields, each named
    │   ├── ContextLengthExceeded
    │   └── GrammarInvalid             a constraint that does not compile
    ├── NotFound
    │   ├── ModelNotFound
    │   └── ModelFileNotFound
    ├── Conflict                       the state of things does not allow it
    │   ├── ModelNotLoaded
    │   ├── ModelAlreadyLoaded
    │   ├── ModelInUse
    │   ├── ModelExists
    │   ├── ModelFileInvalid
    │   ├── ModelOutputInvalid         weights that compute nothing
    │   ├── RequestIdInUse
    │   ├── LoadConflict
    │   ├── PullCancelled
    │   ├── RequestQuarantined         has ended several workers
    │   └── ConstraintDeadEnd          no token goes on from the text so far
    ├── Refused                        not allowed here
    │   ├── KeyMissing
    │   ├── KeyInvalid                 unknown, wrong, expired or revoked
    │   ├── ScopeMissing               the key is for other calls
    │   ├── ModelDenied                the key is for other models
    │   ├── PathNotAllowed
    │   └── HubAccessDenied            gated or private
    ├── Exhausted                      too much of something
    │   ├── QueueFull
    │   ├── QuotaExceeded
    │   ├── SlowConsumer
    │   ├── ConstraintTooCostly
    │   ├── InsufficientMemory
    │   ├── DiskFull
    │   ├── HubRateLimited
    │   └── DeadlineUnreachable        too little time
    ├── NotReady                       try again later
    │   ├── Draining
    │   ├── WorkerCrashed
    │   ├── ModelUnloaded
    │   ├── LoadCooldown               a load failed a moment ago
    │   └── HubUnreachable
    ├── Damaged                        bytes are not what they should be
    │   ├── ChecksumMismatch
    │   └── HubAnswerInvalid
    ├── BackendError                   llama.cpp failed
    │   ├── EngineStartFailed
    │   └── SandboxUnavailable         the settings require what the kernel does not have
    └── FeatureUnsupported             in the contract, not built yet

`reason` is the name that crosses processes and the wire; `metadata` holds the
values that a program can act on. Bases exist for what callers catch together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import msgspec


class FieldViolation(msgspec.Struct, frozen=True):
    """One field that is wrong: its path in the request, and what it must be."""

    field: str
    description: str


class ErrorRecord(msgspec.Struct, frozen=True):
    """An error as data: what frames carry from a worker to the server."""

    reason: str
    message: str
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None


class BearError(Exception):
    """Base of all errors that may reach a caller."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    def to_record(self) -> ErrorRecord:
        """The error as data; `from_record` gives an equal error back."""
        return ErrorRecord(
            self.reason, self.message, self.metadata, list(self.violations), self.retry_after_s
        )


class InvalidRequest(BearError):
    """The caller's input is wrong; the same request fails again."""


class InvalidField(InvalidRequest):
    """Fields of a request are missing, malformed or out of their limits."""

    reason = "INVALID_FIELD"

    def __init__(self, field: str, description: str) -> None:
        self._init([FieldViolation(field, description)])

    @classmethod
    def of(cls, violations: Sequence[FieldViolation]) -> InvalidField:
        """One error for all of them."""
        error = cls.__new__(cls)
        error._init(violations)
        return error

    def _init(self, violations: Sequence[FieldViolation]) -> None:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        super().__init__(text, violations=violations)


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or the prompt and an explicit max_tokens, do not fit the context."""

    reason = "CONTEXT_LENGTH_EXCEEDED"

    def __init__(self, prompt_tokens: int, max_tokens: int | None, context_length: int) -> None:
        asked = f"{prompt_tokens} prompt tokens"
        if max_tokens is not None:
            asked += f" and max_tokens {max_tokens}"
        super().__init__(
            f"{asked} do not fit the context of {context_length} tokens",
            metadata={
                "prompt_token_count": prompt_tokens,
                "context_length": context_length,
                **({} if max_tokens is None else {"max_tokens": max_tokens}),
            },
        )


class GrammarInvalid(InvalidRequest):
    """A constraint does not compile; `problem` is the compiler's message."""

    reason = "GRAMMAR_INVALID"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the constraint does not compile: {problem}")


class NotFound(BearError):
    """Something named in the request does not exist."""


class ModelNotFound(NotFound):
    """No model has this name."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, name: str, nearest: Sequence[str] = ()) -> None:
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        super().__init__(
            f"no model is named {name!r}{hint}",
            metadata={"model": name, "nearest": ",".join(nearest)},
        )


class ModelFileNotFound(NotFound):
    """The model's file does not exist, or has not been downloaded."""

    reason = "MODEL_FILE_NOT_FOUND"

    def __init__(self, path: str) -> None:
        super().__init__(f"Model file not found: {path}", metadata={"path": path})

    @classmethod
    def of(cls, name: str, what: str) -> ModelFileNotFound:
        """Of a model that is not on this server; `what` follows from that."""
        error = cls.__new__(cls)
        text = f"Model file not found: {name} is not on this server; {what}"
        BearError.__init__(error, text, metadata={"model": name})
        return error


class Conflict(BearError):
    """The present state does not allow the call."""


class ModelNotLoaded(Conflict):
    """The model is not loaded, and the call may not or cannot load it."""

    reason = "MODEL_NOT_LOADED"

    def __init__(self, name: str) -> None:
        super().__init__(f"No model loaded under the name {name!r}", metadata={"model": name})


class ModelAlreadyLoaded(Conflict):
    """The model is loaded with other options than those asked for."""

    reason = "MODEL_ALREADY_LOADED"

    def __init__(self, name: str, differing: Sequence[str]) -> None:
        super().__init__(
            f"{name!r} is loaded with other values for {', '.join(differing)}; unload it first",
            metadata={"model": name, "differing": ",".join(differing)},
        )


class ModelInUse(Conflict):
    """The model is loaded, loading, unloading or being downloaded."""

    reason = "MODEL_IN_USE"

    def __init__(self, name: str, what: str = "is in use; unload it first") -> None:
        super().__init__(f"{name!r} {what}", metadata={"model": name})


class ModelExists(Conflict):
    """A model has this name already."""

    reason = "MODEL_EXISTS"

    def __init__(self, name: str) -> None:
        super().__init__(f"a model named {name!r} exists already", metadata={"model": name})


class ModelFileInvalid(Conflict):
    """The file is not a GGUF model, is cut short, corrupt or of an unknown kind."""

    reason = "MODEL_FILE_INVALID"

    def __init__(self, path: str, problem: str, offset: int | None = None) -> None:
        where = "" if offset is None else f" (at byte {offset})"
        super().__init__(
            f"{path}: {problem}{where}",
            metadata={
                "path": path,
                "problem": problem,
                **({} if offset is None else {"offset_bytes": offset}),
            },
        )


class ModelOutputInvalid(Conflict):
    """What the model computes is no distribution over its tokens: its weights are spoiled."""

    reason = "MODEL_OUTPUT_INVALID"

    def __init__(self) -> None:
        super().__init__("the model computed no usable logits; its file may be damaged")


class RequestIdInUse(Conflict):
    """A running request has the id that this one chose."""

    reason = "REQUEST_ID_IN_USE"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"a request with id {request_id!r} is running", metadata={"request_id": request_id})


class LoadConflict(Conflict):
    """The model is being loaded with other options, or is being unloaded."""

    reason = "LOAD_CONFLICT"

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name!r} {what}", metadata={"model": name}, retry_after_s=1.0)


class PullCancelled(Conflict):
    """The download was stopped by someone; what has come is kept for the next one."""

    reason = "PULL_CANCELLED"

    def __init__(self, name: str) -> None:
        super().__init__(f"the download of {name!r} was cancelled", metadata={"model": name})


class RequestQuarantined(Conflict):
    """The request has ended several workers, the last one while nothing else ran."""

    reason = "REQUEST_QUARANTINED"

    def __init__(self, exit_text: str) -> None:
        super().__init__(
            f"the request has ended its worker again and again, at last alone ({exit_text})",
            metadata={"exit": exit_text},
        )


class ConstraintDeadEnd(Conflict):
    """No token of the vocabulary goes on from the text so far within the constraint."""

    reason = "CONSTRAINT_DEAD_END"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the constraint has no way on: {problem}")


class Refused(BearError):
    """The server's configuration does not allow it."""


class KeyMissing(Refused):
    """The server asks for an API key, and the call has none."""

    reason = "KEY_MISSING"

    def __init__(self) -> None:
        super().__init__("an API key is needed, as `authorization: Bearer KEY` or `x-api-key: KEY`")


class KeyInvalid(Refused):
    """The call's API key is not valid, or no longer. Which of it is told to nobody."""

    reason = "KEY_INVALID"

    def __init__(self) -> None:
        super().__init__("the API key is not valid")


class ScopeMissing(Refused):
    """The caller is known, and may not make this call."""

    reason = "SCOPE_MISSING"

    def __init__(self, method: str, scope: str) -> None:
        super().__init__(
            f"{method.rpartition('/')[2]} needs the scope {scope}",
            metadata={"method": method, "scope": scope},
        )


class ModelDenied(Refused):
    """The caller may not use a model of this name, whether or not there is one."""

    reason = "MODEL_DENIED"

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {name!r} may not be used with this key", metadata={"model": name})


class PathNotAllowed(Refused):
    """The path lies outside the folders that models may be registered from."""

    reason = "PATH_NOT_ALLOWED"

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} is outside the allowed folders; the server's --allow-path adds one",
            metadata={"path": path},
        )


class HubAccessDenied(Refused):
    """The model hub refuses: the repository is gated or private, and the server's token does not open it."""

    reason = "HUB_ACCESS_DENIED"

    def __init__(self, repo_id: str, problem: str) -> None:
        super().__init__(f"the hub refuses {repo_id}: {problem}", metadata={"repo_id": repo_id})


class Exhausted(BearError):
    """A bound of the server is reached."""


class QueueFull(Exhausted):
    """As much waits for the model as may; `unit` tells what is counted."""

    reason = "QUEUE_FULL"

    def __init__(
        self,
        name: str,
        limit: int,
        retry_after_s: float,
        *,
        waiting: int,
        asked: int = 1,
        unit: str = "requests",
    ) -> None:
        super().__init__(
            f"{waiting} {unit} wait for {name!r} already; with {asked} more the limit of {limit} is passed",
            metadata={"model": name, "unit": unit, "limit": limit, "waiting": waiting, "asked": asked},
            retry_after_s=retry_after_s,
        )


class QuotaExceeded(Exhausted):
    """The caller has used up a quota, which a field of `Quotas` names; `subject` is the id of its key.

    Of streams that anybody may open it is the caller's tenant, a host where there is no key.
    """

    reason = "QUOTA_EXCEEDED"

    def __init__(self, subject: str, quota: str, limit: int, retry_after_s: float) -> None:
        super().__init__(
            f"{quota} of {subject} is used up, its limit is {limit}",
            metadata={"subject": subject, "quota": quota, "limit": limit},
            retry_after_s=retry_after_s,
        )


class SlowConsumer(Exhausted):
    """The client has not read its stream for too long."""

    reason = "SLOW_CONSUMER"

    def __init__(self, stalled_s: float) -> None:
        super().__init__(
            f"the stream was not read for {stalled_s:.0f} s",
            metadata={"stalled_seconds": f"{stalled_s:.1f}"},
        )


class ConstraintTooCostly(Exhausted):
    """A token of a constraint takes more work than a step may."""

    reason = "CONSTRAINT_TOO_COSTLY"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the constraint costs too much per token: {problem}")


class InsufficientMemory(Exhausted):
    """The model, with these options, does not fit the memory."""

    reason = "INSUFFICIENT_MEMORY"

    def __init__(self, name: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{name!r} needs {needed_bytes / 2**20:.0f} MiB of memory, {free_bytes / 2**20:.0f} MiB are free",
            metadata={"model": name, "needed_bytes": needed_bytes, "free_bytes": free_bytes},
        )


class DiskFull(Exhausted):
    """The disk has no room for a model's files."""

    reason = "DISK_FULL"

    def __init__(self, name: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{name!r} needs {needed_bytes / 2**20:.0f} MiB on disk, {free_bytes / 2**20:.0f} MiB are free",
            metadata={"model": name, "needed_bytes": needed_bytes, "free_bytes": free_bytes},
        )


class HubRateLimited(Exhausted):
    """The model hub takes no more requests from this server for now."""

    reason = "HUB_RATE_LIMITED"

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the hub takes no more requests for now", retry_after_s=retry_after_s)


class DeadlineUnreachable(Exhausted):
    """The first token would come after the caller's deadline, or has not come when that passes."""

    reason = "DEADLINE_UNREACHABLE"

    def __init__(self, predicted_s: float, what: str = "the deadline passes before the first token") -> None:
        super().__init__(
            f"{what}, which would take {predicted_s:.1f} s more",
            metadata={"predicted_seconds": f"{predicted_s:.3f}"},
        )


class NotReady(BearError):
    """Not now; the same request may succeed later."""


class Draining(NotReady):
    """The server is stopping and takes no new work."""

    reason = "DRAINING"

    def __init__(self) -> None:
        super().__init__("the server is stopping", retry_after_s=1.0)


class WorkerCrashed(NotReady):
    """The model's worker process died."""

    reason = "WORKER_CRASHED"

    def __init__(self, name: str, exit_text: str) -> None:
        super().__init__(
            f"the worker of {name!r} ended unexpectedly ({exit_text})",
            metadata={"model": name, "exit": exit_text},
            retry_after_s=1.0,
        )


class ModelUnloaded(NotReady):
    """The model was unloaded while the request ran or waited."""

    reason = "MODEL_UNLOADED"

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} was unloaded", metadata={"model": name}, retry_after_s=1.0)


class LoadCooldown(NotReady):
    """Loading the model has failed; it is not tried again before a time has passed."""

    reason = "LOAD_COOLDOWN"

    def __init__(self, name: str, cause: str, retry_after_s: float) -> None:
        super().__init__(
            f"loading {name!r} failed ({cause}); it is tried again in {retry_after_s:.0f} s at the earliest",
            metadata={"model": name, "cause": cause},
            retry_after_s=retry_after_s,
        )


class HubUnreachable(NotReady):
    """The model hub does not answer, or the server is set to be offline."""

    reason = "HUB_UNREACHABLE"

    def __init__(self, problem: str, retry_after_s: float | None = 5.0) -> None:
        super().__init__(f"the hub cannot be reached: {problem}", retry_after_s=retry_after_s)


class Damaged(BearError):
    """Bytes are not what they should be."""


class ChecksumMismatch(Damaged):
    """A file does not have the SHA-256 that its source announced."""

    reason = "CHECKSUM_MISMATCH"

    def __init__(self, file: str, expected: str, found: str) -> None:
        super().__init__(
            f"{file} has SHA-256 {found}, not {expected}",
            metadata={"file": file, "expected_sha256": expected, "found_sha256": found},
        )


class HubAnswerInvalid(Damaged):
    """What the model hub answers contradicts itself, or is nothing that a hub may answer."""

    reason = "HUB_ANSWER_INVALID"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the hub's answer is not valid: {problem}")


class BackendError(BearError):
    """llama.cpp or the server failed in a way that is nobody's input; the cause is in the log."""

    reason = "INTERNAL"


class EngineStartFailed(BackendError):
    """llama.cpp could not start with this model and these options."""

    reason = "ENGINE_START_FAILED"

    def __init__(self, cause: str) -> None:
        super().__init__(f"Failed to initialize GGUF engine: {cause}", metadata={"cause": cause})


class SandboxUnavailable(BackendError):
    """The settings require a sandbox for workers, and it cannot be put in force here."""

    reason = "SANDBOX_UNAVAILABLE"

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the sandbox of workers is required, and not available: {problem}",
            metadata={"problem": problem},
        )


class FeatureUnsupported(BearError):
    """The contract has it; this server does not do it yet."""

    reason = "FEATURE_UNSUPPORTED"

    def __init__(self, feature: str) -> None:
        super().__init__(f"{feature} is not supported yet", metadata={"feature": feature})


def all_errors(root: type[BearError] = BearError) -> Iterator[type[BearError]]:
    """Every class of the tree, bases before leaves."""
    yield root
    for sub in root.__subclasses__():
        yield from all_errors(sub)


def from_record(record: ErrorRecord) -> BearError:
    """The error that `to_record` was called on; an unknown reason gives a BearError."""
    classes = {cls.reason: cls for cls in all_errors() if "reason" in vars(cls)}
    cls = classes.get(record.reason, BearError)
    # The leaf's own __init__ takes typed values, which the record has as text.
    error = cls.__new__(cls)
    BearError.__init__(
        error,
        record.message,
        metadata=record.metadata,
        violations=record.violations,
        retry_after_s=record.retry_after_s,
    )
    if cls is BearError:
        error.reason = record.reason  # type: ignore[misc]
    return error
