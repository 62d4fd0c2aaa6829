"""Until when a call's answer is wanted."""

from __future__ import annotations

from typing import Any

# Longer is no deadline: some clients write one that is far away for none.
LONGEST_S = 1e8


def deadline_of(context: Any, received_s: float, max_request_s: float) -> float:
    """The deadline of a call received at `received_s`, both CLOCK_MONOTONIC; 0 for none.

    It is the client's; without one `max_request_s` after the call came, 0 for never.
    """
    left_s = context.time_remaining()
    if left_s is None:
        left_s = max_request_s or LONGEST_S
    return received_s + left_s if left_s < LONGEST_S else 0.0
