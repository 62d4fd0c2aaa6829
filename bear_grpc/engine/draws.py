"""Where a random number falls among candidates: plainly, by mirostat, or by adaptive-p.

Mirostat and adaptive-p steer the draws of one sequence towards a target; what
they have learnt is one number, `state`, which can be carried elsewhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from ..backend.base import Ids, Logits
from ..backend.prefilter import largest
from ..params import SamplingParams

# Over so many of the most likely tokens mirostat 1 estimates Zipf's exponent (llama.cpp's server).
_ZIPF_TOKENS = 100
# Of adaptive-p: width and height of the preferred range, and how steep its sides are (llama.cpp).
_WIDTH, _PEAK, _SHARPNESS = 0.3, 5.0, 10.0

Chances = NDArray[np.float64]


def softmax(logits: NDArray[np.floating]) -> Chances:
    """(n,) probabilities of candidates, of which one at least is above -inf."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    result: Chances = weights / weights.sum()
    return result


def place_of(logits: NDArray[np.floating], at: float) -> int:
    """The place at `at` (0 to 1) of the cumulated softmax; the first infinite logit, if there is one."""
    best = logits.max()
    if len(logits) == 1 or not math.isfinite(best):
        return int(logits.argmax())
    bounds = np.exp(logits.astype(np.float64) - best).cumsum()
    return min(int(bounds.searchsorted(at * bounds[-1], side="right")), len(logits) - 1)


class SteeredDraw(ABC):
    """Draws that depend on the draws before, by one number."""

    def __init__(self, state: float) -> None:
        self.state = state
        self._pending: tuple[int, float] | None = None

    def draw(self, ids: Ids, logits: Logits, at: float, n_vocab: int) -> int:
        """The token at `at` (0 to 1). `logits` (n_candidates,) are not all -inf."""
        places, place, state = self._draw(logits, at, n_vocab)
        token = int(ids[places[place]])
        self._pending = token, state
        return token

    def accept(self, token: int) -> None:
        """Learns from a token if it is the one of the last draw."""
        if self._pending is not None and self._pending[0] == token:
            self.state = self._pending[1]
        self._pending = None

    @abstractmethod
    def _draw(self, logits: Logits, at: float, n_vocab: int) -> tuple[NDArray[np.intp], int, float]:
        """Places that could be drawn, which of them it is, and the state after it."""


class Mirostat(SteeredDraw):
    """Holds the surprise of the text near a target; `state` is mu, in bits.

    Basu et al. 2021, "Mirostat: A neural text decoding algorithm that directly
    controls perplexity", as in llama.cpp's llama_sampler_mirostat and _v2.
    """

    def __init__(self, params: SamplingParams) -> None:
        super().__init__(2.0 * params.mirostat_tau)
        self._version, self._tau, self._eta = params.mirostat, params.mirostat_tau, params.mirostat_eta

    def _draw(self, logits: Logits, at: float, n_vocab: int) -> tuple[NDArray[np.intp], int, float]:
        places = self._first(logits, n_vocab) if self._version == 1 else self._second(logits)
        place = place_of(logits[places], at)
        surprise = -math.log2(softmax(logits[places])[place])
        return places, place, self.state - self._eta * (surprise - self._tau)

    def _first(self, logits: Logits, n_vocab: int) -> NDArray[np.intp]:
        """The k most likely, k from an estimate of Zipf's exponent."""
        top = logits[largest(logits, _ZIPF_TOKENS)].astype(np.float64)
        top = top[top > -np.inf]
        if len(top) < 2:
            return largest(logits, 1)
        ranks = np.arange(1, len(top))
        steps = np.log((ranks + 1) / ranks)
        exponent = float((steps * (top[:-1] - top[1:])).sum() / (steps * steps).sum())
        return largest(logits, self._count(exponent, n_vocab, len(logits)))

    def _count(self, exponent: float, n_vocab: int, most: int) -> int:
        """How many of `most` candidates have the wanted surprise; logarithms keep it in range."""
        if exponent < 1e-6 or n_vocab < 2:
            return most
        rest = exponent - 1
        # rest / (1 - n_vocab ** -rest), whose limit at 0 is 1 / log(n_vocab).
        share = -math.expm1(-rest * math.log(n_vocab))
        share = rest / share if share else 1 / math.log(n_vocab)
        count = (math.log(share) + self.state * math.log(2)) / exponent
        return most if count >= math.log(most) else max(1, int(math.exp(count)))

    def _second(self, logits: Logits) -> NDArray[np.intp]:
        """Those whose surprise is not above mu, or the most likely one."""
        with np.errstate(divide="ignore"):
            places = np.flatnonzero(-np.log2(softmax(logits)) <= self.state)
        return places if len(places) else largest(logits, 1)


class AdaptiveP(SteeredDraw):
    """Prefers tokens whose probability is near to a target that makes up for the last ones.

    llama.cpp's llama_sampler_adaptive_p. `state` is the decayed sum of the
    drawn tokens' probabilities; the sum of their weights never changes, as
    both begin as if the target had been met for ever.
    """

    def __init__(self, params: SamplingParams) -> None:
        assert params.adaptive_p_target is not None
        self._target, self._decay = params.adaptive_p_target, params.adaptive_p_decay
        self._total = 1 / (1 - self._decay)
        super().__init__(self._target * self._total)

    def _draw(self, logits: Logits, at: float, n_vocab: int) -> tuple[NDArray[np.intp], int, float]:
        places = np.flatnonzero(logits > -np.inf)
        chances = softmax(logits[places])
        target = min(max(2 * self._target - self.state / self._total, 0.0), 1.0)
        distance = np.abs(chances - target) / _WIDTH
        place = place_of(_PEAK - _SHARPNESS * distance * distance / (1 + distance), at)
        return places, place, float(chances[place]) + self._decay * self.state
