"""What one model's executor may do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..input_limits import DEFAULT_LIMITS, InputLimits
from ..protocol import Load
from ..types import CostTable, LoadOptions


class ExecutorLimits(msgspec.Struct, frozen=True):
    """What one model's executor may do. `step_target_s` 0: chosen by the worker.

    `startup_timeout_s` is how long a worker may be silent before its libraries are loaded.
    `max_restarts` is how often a request goes on in another worker.
    """

    max_waiting: int = 512
    max_waiting_tokens: int = 2**18
    stall_timeout_s: float = 30.0
    step_target_s: float = 0.0
    share_prefixes: bool = True
    priority_aging_s: float = 10.0
    heartbeat_timeout_s: float = 10.0
    startup_timeout_s: float = 60.0
    max_restarts: int = 3
    input: InputLimits = DEFAULT_LIMITS

    def load(
        self,
        model: str,
        path: Path,
        options: LoadOptions,
        cores: int,
        costs: Sequence[CostTable],
        chat_template: str | None,
    ) -> Load:
        """What a worker is told of a model and of these limits."""
        return Load(
            model,
            str(path),
            options,
            cores,
            stall_timeout_s=self.stall_timeout_s,
            step_target_s=self.step_target_s,
            share_prefixes=self.share_prefixes,
            priority_aging_s=self.priority_aging_s,
            max_waiting_tokens=self.max_waiting_tokens,
            max_text_job_s=self.input.max_text_job_s,
            max_rendered_chars=self.input.max_rendered_chars,
            cost_tables=list(costs),
            chat_template=chat_template,
        )
