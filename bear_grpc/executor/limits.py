"""What one model's executor may do."""

from __future__ import annotations

import msgspec

from ..input_limits import DEFAULT_LIMITS, InputLimits


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
