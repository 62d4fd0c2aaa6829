"""llama.cpp's filters in plain numpy: the same candidates, slowly."""

from __future__ import annotations

import collections
import math

import numpy as np
from numpy.typing import NDArray

from ..backend.base import Ids, Logits, Sampler
from ..types import SamplingParams


class FakeSampler(Sampler):
    """The filters of one sequence in llama-server's order. Not used after `close`."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        window = params.repetition_window
        self._seen: collections.deque[int] = collections.deque(maxlen=None if window < 0 else window)
        self.closed = False

    def candidates(self, logits: Logits) -> tuple[Ids, Logits]:
        """Tokens that may be drawn, most likely first, and their changed logits."""
        self._check_open()
        params = self._params
        values = logits.astype(np.float64)
        self._change(values)
        ids = np.argsort(-values, kind="stable")
        if params.temperature == 0:
            return ids.astype(np.int32), values[ids].astype(np.float32)
        if params.top_k > 0:
            ids = ids[: params.top_k]
        if params.typical_p < 1:
            ids = ids[_typical(values[ids], params.typical_p)]
        if params.top_p < 1:
            sums = np.cumsum(_softmax(values[ids]))
            ids = ids[: int(np.searchsorted(sums, params.top_p)) + 1]
        if params.min_p > 0:
            ids = ids[values[ids] >= values[ids].max() + math.log(params.min_p)]
        return ids.astype(np.int32), (values[ids] / params.temperature).astype(np.float32)

    def accept(self, token: int) -> None:
        """Counts a token as seen."""
        self._check_open()
        self._seen.append(token)

    def close(self) -> None:
        """Ends it; closing twice would free memory twice in llama.cpp."""
        self._check_open()
        self.closed = True

    def _change(self, values: NDArray[np.float64]) -> None:
        """Bias, then penalties, in place."""
        params = self._params
        for token, bias in params.logit_bias:
            values[token] += bias
        if not params.uses_penalties:
            return
        for token, count in collections.Counter(self._seen).items():
            penalty = params.repetition_penalty
            values[token] *= penalty if values[token] <= 0 else 1 / penalty
            values[token] -= count * params.frequency_penalty + params.presence_penalty

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the sampler is closed")


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(values - values.max())
    result: NDArray[np.float64] = weights / weights.sum()
    return result


def _typical(values: NDArray[np.float64], p: float) -> NDArray[np.intp]:
    """Places of the candidates whose surprise is closest to the mean, until they sum above p."""
    chances = _softmax(values)
    surprise = -np.log(np.maximum(chances, np.finfo(np.float64).tiny))
    order = np.argsort(np.abs(surprise - (chances * surprise).sum()), kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(chances[order]), p, side="right")) + 1]
    # As llama.cpp leaves them to the next filter: most likely first again.
    return np.sort(kept)
