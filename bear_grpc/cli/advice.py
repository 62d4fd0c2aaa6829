"""Errors as a person reads them: what happened, and what can be done about it."""

from __future__ import annotations

from bear_grpc.cli import output
from bear_grpc.errors import BearError

# NAME stands for the model that the error is about.
_HINTS = {
    "MODEL_NOT_LOADED": "`bear load NAME` loads it",
    "MODEL_ALREADY_LOADED": "`bear unload NAME` unloads it",
    "MODEL_IN_USE": "`bear unload NAME` unloads it, `bear pull --cancel NAME` ends its download",
    "MODEL_EXISTS": "`bear rm NAME` makes the name free",
    "MODEL_FILE_NOT_FOUND": "`bear pull NAME` downloads a model of the catalog or of the hub",
    "PATH_NOT_ALLOWED": "`bear serve --allow-path DIR` allows a folder",
    "CONTEXT_LENGTH_EXCEEDED": "`bear load NAME --context-length N` makes room, if the model can",
    "LOAD_COOLDOWN": "`bear show NAME` tells why it failed, `bear load NAME` tries again at once",
    "INSUFFICIENT_MEMORY": (
        "`bear estimate NAME` shows what takes it; a smaller --context-length or --max-sequences takes less"
    ),
    "DISK_FULL": "`bear prune` and `bear rm` make room; `bear pull NAME` goes on from where it stopped",
    "PULL_CANCELLED": "`bear pull NAME` goes on from where it stopped",
    "CHECKSUM_MISMATCH": "`bear pull NAME` fetches it anew, `bear prune` removes what has come",
    "KEY_MISSING": "set BEAR_API_KEY, or give --api-key; `bear keys create` on the server makes a key",
    "KEY_INVALID": "`bear keys list` on the server tells which keys are valid",
    "SCOPE_MISSING": "`bear keys create --scope SCOPE` on the server makes a key that may",
    "MODEL_DENIED": "`bear keys create --model NAME` on the server makes a key that may",
    "QUOTA_EXCEEDED": "`bear usage` on the server tells what was used, `bear keys show ID` what may be",
    "HUB_ACCESS_DENIED": (
        "accept the terms on the model's page if it has some, then start the server with a token of the hub "
        "that may read it: BEAR_HUB_TOKEN=hf_..."
    ),
}


def report(error: BearError) -> None:
    """One line for an error on stderr, and one of advice where there is some."""
    output.note(f"error: {' '.join(error.message.split())} [{error.reason}]")
    if hint := advice(error):
        output.note(f"hint: {hint}")


def advice(error: BearError) -> str | None:
    """One line for a person; None where there is none to give."""
    if error.reason == "MODEL_NOT_FOUND":
        return _nearest(error)
    if error.reason in _HINTS:
        hint = _HINTS[error.reason].replace("NAME", error.metadata.get("model", "NAME"))
        lacking = _lacking_bytes(error)
        return f"{output.size(lacking)} more are needed; {hint}" if lacking > 0 else hint
    if error.retry_after_s is not None:
        return f"try again in {error.retry_after_s:g} s"
    return None


def _nearest(error: BearError) -> str:
    known = "`bear list --all` shows the models of this server"
    names = [name for name in error.metadata.get("nearest", "").split(",") if name]
    if not names or all(name in error.message for name in names):
        return known
    return f"did you mean {' or '.join(names)}? {known}"


def _lacking_bytes(error: BearError) -> int:
    needed, free = error.metadata.get("needed_bytes", ""), error.metadata.get("free_bytes", "")
    # What a server sends need not be a number.
    return int(needed) - int(free) if needed.isdecimal() and free.isdecimal() else 0
