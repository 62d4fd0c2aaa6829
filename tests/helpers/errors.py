"""One error of each class that is raised, made as the product makes it."""

from __future__ import annotations

from collections.abc import Callable

from bear_grpc import errors

TREE = [kind for kind in errors.all_errors() if kind.__module__ == errors.__name__]
"""Every class of `bear_grpc.errors`; the client has leaves of its own, which no server raises."""

LEAVES = [kind for kind in TREE if kind not in {each.__base__ for each in TREE}]

EXAMPLES: dict[type[errors.BearError], Callable[[], errors.BearError]] = {
    errors.InvalidField: lambda: errors.InvalidField("sampling.top_k", "must be 0 to 9, is 10"),
    errors.ContextLengthExceeded: lambda: errors.ContextLengthExceeded(100, 50, 128),
    errors.GrammarInvalid: lambda: errors.GrammarInvalid("line 1: a rule is missing"),
    errors.ModelNotFound: lambda: errors.ModelNotFound("bear", ["bear-demo"]),
    errors.ModelFileNotFound: lambda: errors.ModelFileNotFound("/models/a.gguf"),
    errors.ModelNotLoaded: lambda: errors.ModelNotLoaded("bear-demo"),
    errors.ModelAlreadyLoaded: lambda: errors.ModelAlreadyLoaded("bear-demo", ["threads"]),
    errors.ModelInUse: lambda: errors.ModelInUse("bear-demo"),
    errors.ModelExists: lambda: errors.ModelExists("bear-demo"),
    errors.ModelFileInvalid: lambda: errors.ModelFileInvalid("/models/a.gguf", "cut short", 24),
    errors.RequestIdInUse: lambda: errors.RequestIdInUse("r1"),
    errors.LoadConflict: lambda: errors.LoadConflict("bear-demo", "is being loaded with other options"),
    errors.ConstraintDeadEnd: lambda: errors.ConstraintDeadEnd("no token begins with a digit"),
    errors.RequestQuarantined: lambda: errors.RequestQuarantined("SIGSEGV"),
    errors.KeyMissing: errors.KeyMissing,
    errors.KeyInvalid: errors.KeyInvalid,
    errors.ScopeMissing: lambda: errors.ScopeMissing("/bear_grpc.v1.ServerService/Drain", "server:admin"),
    errors.ModelDenied: lambda: errors.ModelDenied("bear-demo"),
    errors.PathNotAllowed: lambda: errors.PathNotAllowed("/etc/a.gguf"),
    errors.QueueFull: lambda: errors.QueueFull("bear-demo", 512, 2.5, waiting=510, asked=3),
    errors.QuotaExceeded: lambda: errors.QuotaExceeded("engx2w4zuk", "tokens_per_day", 1000, 2.5),
    errors.SlowConsumer: lambda: errors.SlowConsumer(30.0),
    errors.ConstraintTooCostly: lambda: errors.ConstraintTooCostly("over 250,000 items"),
    errors.InsufficientMemory: lambda: errors.InsufficientMemory("bear-demo", 2**31, 2**30),
    errors.Draining: lambda: errors.Draining(),
    errors.WorkerCrashed: lambda: errors.WorkerCrashed("bear-demo", "SIGSEGV"),
    errors.ModelUnloaded: lambda: errors.ModelUnloaded("bear-demo"),
    errors.PullCancelled: lambda: errors.PullCancelled("tinyllama-1.1b"),
    errors.HubAccessDenied: lambda: errors.HubAccessDenied("owner/repo", "it is gated"),
    errors.DiskFull: lambda: errors.DiskFull("tinyllama-1.1b", 2**31, 2**30),
    errors.HubRateLimited: lambda: errors.HubRateLimited(30.0),
    errors.DeadlineUnreachable: lambda: errors.DeadlineUnreachable(2.5),
    errors.LoadCooldown: lambda: errors.LoadCooldown("bear-demo", "no context", 10.0),
    errors.HubUnreachable: lambda: errors.HubUnreachable("connection refused"),
    errors.ChecksumMismatch: lambda: errors.ChecksumMismatch("a.gguf", "00", "ff"),
    errors.ModelOutputInvalid: errors.ModelOutputInvalid,
    errors.HubAnswerInvalid: lambda: errors.HubAnswerInvalid("an ETag that is no SHA-256"),
    errors.BackendError: lambda: errors.BackendError("the computation failed"),
    errors.EngineStartFailed: lambda: errors.EngineStartFailed("no context"),
    errors.SandboxUnavailable: lambda: errors.SandboxUnavailable("seccomp: no filter for riscv64"),
    errors.FeatureUnsupported: lambda: errors.FeatureUnsupported("keep_alive"),
}
