"""A worker with the real main and the real sandbox, and a model that tries to escape.

`python -m tests.helpers.confined_worker FD MODE FOLDER [WITHOUT]`; WITHOUT is the part
of the sandbox that this kernel is to be without. Imports nothing that starts threads:
the package `bear_grpc.testing` comes after the sandbox, as numpy does.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bear_grpc import suspects
from bear_grpc.protocol import Frame, Load
from bear_grpc.types import SandboxMode
from bear_grpc.worker import landlock, seccomp
from bear_grpc.worker.main import main


def run(fd: int, mode: SandboxMode, folder: Path, without: str) -> None:
    confines = mode is not SandboxMode.OFF

    def escape() -> Any:
        from bear_grpc.testing.escape import Escape

        return Escape(folder, folder / "secret", folder / "model.gguf", fd)

    def open_model(load: Load, post: Callable[[Frame], None]) -> Any:
        from bear_grpc.testing.escape import EscapingBackend

        return EscapingBackend(load.options, escape(), last=confines)

    def unavailable(*_: object) -> int:
        raise landlock.Unavailable(f"{without}: not on this kernel")

    if without:
        {"landlock": landlock, "seccomp": seccomp}[without].confine = unavailable
    # The handler runs on the main thread, which is the I/O thread.
    signal.signal(signal.SIGUSR2, lambda *_: escape().report("io", last=confines))
    main(fd, suspects.create(), mode, open_model)


if __name__ == "__main__":
    run(int(sys.argv[1]), SandboxMode(sys.argv[2]), Path(sys.argv[3]), "".join(sys.argv[4:]))
