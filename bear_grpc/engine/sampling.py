"""The last step of sampling: which of the candidates is drawn.

The draw keeps no state. Its random number depends on the seed, the branch and
the position alone, so a sequence that is computed again goes on as it began.
"""

from __future__ import annotations

import numpy as np

from ..backend.base import Ids, Logits, Sampler
from ..types import SamplingParams

_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """One SplitMix64 output (Steele, Lea, Flood 2014, "Fast splittable PRNGs")."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that looks random and depends on its three arguments alone."""
    return (_mix(_mix(_mix(seed) ^ index) ^ position) >> 11) / 2**53


def draw(ids: Ids, logits: Logits, at: float) -> int:
    """The token at `at` (0 to 1) of the cumulated softmax of the candidates."""
    weights = np.exp((logits - logits.max()).astype(np.float64))
    bounds = np.cumsum(weights)
    place = int(np.searchsorted(bounds, at * bounds[-1], side="right"))
    return int(ids[min(place, len(ids) - 1)])


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the maximum of the logits and their biases is the answer, without any filter."""
    return params.temperature == 0 and not params.uses_penalties


def choose(params: SamplingParams, sampler: Sampler | None, logits: Logits, position: int) -> int:
    """The next token at `position` of its sequence. `sampler` is None for plain greedy."""
    if sampler is None:
        if params.logit_bias:
            logits = logits.copy()
            for token, bias in params.logit_bias:
                logits[token] += bias
        return int(logits.argmax())
    ids, changed = sampler.candidates(logits)
    if params.temperature == 0:
        return int(ids[changed.argmax()])
    return draw(ids, changed, uniform(params.seed, 0, position))
