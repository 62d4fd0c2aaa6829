"""How long a step takes by the number of tokens in it: measured, kept, refined by every step.

Steps of up to 16 tokens cost nearly the same as one of 16 on many CPUs, and the ratio of
decode to prefill differs by kernels and number formats: nothing here is assumed.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence

from ..backend.base import Backend, Batch, Outcome
from ..types import StepCost

# What is kept; a step counts for the next size from it on, as kernels round up to their tiles.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
# Rows that matrix kernels compute together.
KERNEL_ROWS = 16
# What a load measures where nothing is known. The last one decides on repacked weights.
FIRST_SIZES = (1, 2, 16, 64)
REPEATS, ENOUGH_S = 3, 0.25
# A slow step may be a neighbour's fault, a fast one is none.
SLOWER_WEIGHT, FASTER_WEIGHT = 0.1, 0.3


class CostModel:
    """Seconds by tokens of a step. Owner thread only."""

    def __init__(self, costs: Iterable[StepCost] = ()) -> None:
        self._seconds = {cost.tokens: cost.seconds for cost in costs if cost.seconds > 0}
        self._sizes = sorted(self._seconds)

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` took `seconds`."""
        size = SIZES[min(bisect.bisect_left(SIZES, tokens), len(SIZES) - 1)]
        known = self._seconds.get(size)
        if known is None:
            bisect.insort(self._sizes, size)
            self._seconds[size] = seconds
        else:
            weight = SLOWER_WEIGHT if seconds > known else FASTER_WEIGHT
            self._seconds[size] = known + weight * (seconds - known)

    def predict(self, tokens: int) -> float:
        """Seconds of a step of `tokens`; 0 while nothing is known, and for no tokens."""
        sizes, seconds = self._sizes, self._seconds
        if not sizes or tokens <= 0:
            return 0.0
        place = bisect.bisect_left(sizes, tokens)
        if (place < len(sizes) and sizes[place] == tokens) or place == 0:
            return seconds[sizes[place]]
        if place == len(sizes):
            return seconds[sizes[-1]] * tokens / sizes[-1]
        low, high = sizes[place - 1], sizes[place]
        part = (tokens - low) / (high - low)
        return seconds[low] + part * (seconds[high] - seconds[low])

    def most(self, target_s: float, most: int, *, beside: int = 0) -> int:
        """The most tokens, up to `most`, that fit into `target_s` beside others in the same step.

        Never less than what fills the tile that those others have begun, and above it
        only sizes that fill their tiles.
        """
        if self.predict(beside + most) <= target_s:
            return most
        best = min(most, KERNEL_ROWS - beside % KERNEL_ROWS)
        for size in SIZES:
            if best < size - beside <= most and self.predict(size) <= target_s:
                best = size - beside
        return best

    def known(self) -> list[StepCost]:
        """All that is known, ascending by tokens."""
        return [StepCost(size, self._seconds[size]) for size in self._sizes]


def measure(
    backend: Backend, clock: Callable[[], float], sizes: Sequence[int] = FIRST_SIZES
) -> list[StepCost]:
    """Times steps on the empty sequence 0 and leaves it empty. Takes the best of a few, fewer of long ones.

    Sizes that the backend does not take are left out.
    """
    options = backend.options
    most = min(options.batch_tokens or 1, options.context_length or 1)
    batch = Batch(most)
    costs: list[StepCost] = []
    for size in (size for size in sizes if size <= most):
        times: list[float] = []
        while len(times) < REPEATS and sum(times) < ENOUGH_S:
            batch.clear()
            batch.extend(0, 0, [1 % backend.vocabulary.size] * size, True)
            began = clock()
            done = backend.forward(batch)
            times.append(clock() - began)
            backend.kv_remove(0, 0)
            if done is not Outcome.DONE:
                return costs
        costs.append(StepCost(size, min(times)))
    return costs


def repacked_is_better(plain: Iterable[StepCost], repacked: Iterable[StepCost]) -> bool:
    """Whether the time of one stream and that of a prompt are less together, each counted alike."""
    small, large = FIRST_SIZES[0], FIRST_SIZES[-1]
    one, other = CostModel(plain), CostModel(repacked)
    return other.predict(small) * other.predict(large) < one.predict(small) * one.predict(large)
