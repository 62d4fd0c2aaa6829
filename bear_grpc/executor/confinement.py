"""What the server knows of its workers' sandbox."""

from __future__ import annotations

import logging

from ..protocol import Confined
from ..types import SandboxMode, SandboxState

log = logging.getLogger(__name__)


class Confinement:
    """The setting, and what the last worker told. `take` on the event loop only."""

    def __init__(self, mode: SandboxMode) -> None:
        self.mode = mode
        self._last: Confined | None = None
        self._warned = False

    @property
    def state(self) -> SandboxState:
        """As the last worker told; OFF before the first has."""
        return SandboxState.OFF if self._last is None else self._last.state

    @property
    def detail(self) -> str:
        """What enforces it, or why it is not fully on; empty before the first worker."""
        last = self._last
        if last is None:
            return ""
        if last.state is SandboxState.ON:
            return f"profile {last.profile}, Landlock ABI {last.landlock_abi}, seccomp"
        return last.problem

    def take(self, told: Confined) -> None:
        """Notes it; the first time that the sandbox is not fully on, the log says so loudly."""
        self._last = told
        if told.state is not SandboxState.ON and not self._warned:
            self._warned = True
            log.warning(
                "WORKERS ARE NOT FULLY CONFINED (sandbox %s): %s. A model file that attacks llama.cpp "
                "has the rights of this server.",
                told.state.value,
                told.problem,
            )
