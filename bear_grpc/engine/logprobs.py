"""Log probabilities of tokens in the model's own distribution, before any filter."""

from __future__ import annotations

import math

import numpy as np

from ..backend.base import Logits
from ..backend.prefilter import largest


def logprobs(logits: Logits, token: int, top_n: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithm of a token's probability, and the `top_n` likeliest tokens with theirs.

    `logits` (n_vocab,) is a raw row. The list is in order, equally likely
    tokens by id. The sum is taken in float64: that of a large vocabulary in
    float32 would be wrong in the fourth digit.
    """
    best = float(logits.max())
    total = math.log(float(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))

    def of(place: int) -> float:
        # In this order the logarithm is not lost beside large logits.
        return (float(logits[place]) - best) - total

    return of(token), [(place, of(place)) for place in largest(logits, top_n).tolist()]
