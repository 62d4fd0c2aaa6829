"""Steps that are shared fairly, when one tenant has more sequences running than another.

A step with 16 sequences takes longer than one with two: without more, who has 15 of them makes the other's
one slower than it is beside a single one. Pure policy, without a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .sequence import Phase, Sequence

# Over time, steps take at most so many times what they would if all tenants had as few sequences as the
# one with the fewest. Full steps do more for their time: they alternate with small ones.
SLOWER = 1.5


class Turns:
    """Which sequences a step may be for. Owner thread only."""

    def __init__(self) -> None:
        self._saved_s = 0.0
        self._step = 0

    def fewest(self, runnable: Collection[Sequence]) -> list[Sequence] | None:
        """As many of each tenant's as of the one that has the fewest; None if all have as many.

        Those that decode come first, and of them those that have not been planned for longest.
        """
        tenants: dict[str, list[Sequence]] = {}
        for sequence in runnable:
            tenants.setdefault(sequence.tenant, []).append(sequence)
        fewest = min(map(len, tenants.values()), default=0)
        if fewest * len(tenants) == len(runnable):
            self._saved_s = 0.0
            return None
        return [sequence for those in tenants.values() for sequence in sorted(those, key=_turn)[:fewest]]

    def is_time_for(self, all_s: float, fewest_s: float) -> bool:
        """Whether the next step is for all, which takes `all_s`, or else for the fewest."""
        earned_s = SLOWER * fewest_s
        is_for_all = all_s <= earned_s + self._saved_s
        self._saved_s = min(all_s, self._saved_s + earned_s - (all_s if is_for_all else fewest_s))
        return is_for_all

    def note(self, planned: Iterable[Sequence]) -> None:
        """These are computed in the next step."""
        self._step += 1
        for sequence in planned:
            sequence.planned_at = self._step


def _turn(sequence: Sequence) -> tuple[bool, int]:
    return sequence.phase is Phase.PREFILL, sequence.planned_at
