"""The tie rule: when two greedy outputs of a real model count as the same.

Floating point depends on the shape of a step, so a batch may choose another token where two are as good
as equal. Outputs are the same if they differ first where the gap between the two best logits, when asked
alone, is below four times the difference that batch shapes were seen to make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bear_grpc.v1 import inference_service_pb2 as pb

FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Tokens of a greedy answer, the log probability of each and its lead over the second best."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    leads: tuple[float, ...]

    @classmethod
    def of(cls, tokens: Sequence[pb.Token]) -> Greedy:
        """Of tokens that came with `top_logprobs` 2."""
        return cls(
            tuple(token.id for token in tokens),
            tuple(token.logprob for token in tokens),
            tuple(token.top[0].logprob - token.top[1].logprob for token in tokens),
        )

    def shared_with(self, other: Greedy) -> int:
        """How many first tokens both have."""
        pairs = zip(self.ids, other.ids, strict=False)
        return next(
            (place for place, (one, two) in enumerate(pairs) if one != two),
            min(len(self.ids), len(other.ids)),
        )


def noise(pairs: Sequence[tuple[Greedy, Greedy]]) -> float:
    """The largest difference that company made to a log probability after the same tokens."""
    return max(
        (
            abs(alone.logprobs[place] - together.logprobs[place])
            for alone, together in pairs
            for place in range(alone.shared_with(together))
        ),
        default=0.0,
    )


def are_same(alone: Greedy, together: Greedy, tolerance: float) -> bool:
    """The rule; `tolerance` is FACTOR times the noise."""
    place = alone.shared_with(together)
    if place == len(alone.ids) == len(together.ids):
        return True
    return place < len(alone.ids) and alone.leads[place] < tolerance
