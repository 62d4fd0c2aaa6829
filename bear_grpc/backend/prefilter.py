"""The few logits of a row that can matter, found without a sort of it.

Exact: what is left out could not be drawn, whatever the filters do with the
rest. Numpy only.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..params import SamplerKind, SamplingParams
from .base import Ids, Logits

_MIN_GROUPS = 512
# With fewer rows of groups than this, the maxima are as many as the logits nearly.
_MIN_ROWS = 4
# Up to so many tokens a copy of the row without the seen ones costs more than it saves.
_COUNTED = 128
# In most texts so many tokens hold what top_p keeps.
_LIKELY = 256
# Rounding of llama.cpp's division and logarithm, in logits.
_SLACK = 0.01
# By less than this nothing is divided: float32 would overflow to infinities, and these give NaN.
LEAST_DIVISOR = 1e-6


def reached_by(row: NDArray[Any], count: int) -> float:
    """A value that at least `count` logits reach, near to the `count`-th largest; -inf if none is near.

    The `count`-th largest of the maxima of disjoint groups: `count` groups
    have a logit that is as large. A group is every n-th token, so that
    numpy finds all maxima at the speed of memory. NaN counts as large.
    """
    groups = _MIN_GROUPS
    while groups < 4 * count:
        groups *= 2
    rows = len(row) // groups
    if rows < _MIN_ROWS:
        return -np.inf
    # What is left over belongs to no group: the value is no larger for it.
    maxima = np.maximum.reduce(row[: rows * groups].reshape(rows, groups), axis=0)
    maxima.partition(groups - count)
    return float(maxima[groups - count])


def largest(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    """Places of the `count` largest values, the largest first; equal ones in their order."""
    if count <= 0:
        return np.empty(0, np.intp)
    least = reached_by(values, count)
    if least > -np.inf:
        places = np.flatnonzero(values >= least)
    elif count < len(values):
        places = np.flatnonzero(values >= np.partition(values, -count)[-count])
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")[:count]]


class Limit(NamedTuple):
    """Which logits are enough for the filters of a sequence.

    The `keep` largest and, with `gap`, those that lie within it of the largest.
    With `divisor`, a temperature, they are a guess: top_p must find its sum in
    them, beside the mass of the others (`log_mass_without`).
    """

    keep: int
    gap: float | None = None
    divisor: float | None = None


def limit_of(params: SamplingParams) -> Limit | None:
    """What the filters need; None if it is the whole row.

    Penalties and DRY change seen tokens only, which are kept in any case; a
    temperature keeps the order.
    """
    gap, scale, keep = None, 1.0, 1
    for kind in params.filters:
        match kind:
            case SamplerKind.PENALTIES | SamplerKind.DRY:
                continue
            case SamplerKind.TEMPERATURE if params.dynamic_temperature_range == 0:
                scale = max(params.temperature, LEAST_DIVISOR)
            case SamplerKind.MIN_P:
                gap, keep = scale * (_SLACK - math.log(params.min_p)), params.min_keep
            case SamplerKind.TOP_K:
                return Limit(max(params.top_k, keep))
            case SamplerKind.TOP_P if gap is None:
                return Limit(_LIKELY, divisor=scale)
            case _:
                break
    if params.is_greedy:
        return Limit(1)
    return None if gap is None else Limit(keep, gap)


def few(row: Logits, limit: Limit, seen: Ids) -> NDArray[np.intp] | None:
    """Ids of the logits that are enough and of all `seen` ones, ascending; None if the row has no few."""
    keep, gap = limit.keep, limit.gap
    if gap is None and keep + len(seen) <= _COUNTED:
        # So many logits reach it that `keep` of them are of tokens that nothing changes.
        least = reached_by(row, keep + len(seen))
    else:
        rest = row.copy()
        rest[seen] = -np.inf
        least = float(rest.max()) if gap is not None and keep == 1 else reached_by(rest, keep)
        if gap is not None:
            least = min(least, float(rest.max()) - gap)
    if not least > -np.inf:
        return None
    reached = row >= least
    reached[seen] = True
    return reached.nonzero()[0]


def log_mass_without(row: Logits, ids: NDArray[np.intp], divisor: float) -> float:
    """Logarithm of the summed exponentials of all logits but those of `ids`, over `divisor`; or NaN."""
    best = row.max()
    weights = np.exp((row - best) * np.float32(1 / divisor))
    weights[ids] = 0
    mass = float(weights.sum(dtype=np.float64))
    return math.log(mass) + float(best) / divisor if mass else -math.inf


class SeenTokens:
    """Which tokens are among the last `window` ones, each once."""

    def __init__(self, window: int) -> None:
        self._last: deque[int] = deque()
        self._window = window
        self._counts: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._tokens: Ids = np.empty(window, np.int32)

    @property
    def tokens(self) -> Ids:
        """(n_seen,) in no order; valid until the next `add`."""
        return self._tokens[: len(self._places)]

    def add(self, token: int) -> None:
        """Counts a token; the oldest leaves a full window."""
        counts, places = self._counts, self._places
        count = counts.get(token, 0)
        counts[token] = count + 1
        self._last.append(token)
        if len(self._last) > self._window:
            self._forget(self._last.popleft())
        # After the oldest has left: there is always a free place then.
        if token not in places:
            self._tokens[len(places)] = token
            places[token] = len(places)

    def _forget(self, token: int) -> None:
        if self._counts[token] > 1:
            self._counts[token] -= 1
            return
        del self._counts[token]
        place = self._places.pop(token)
        if place < len(self._places):
            # The last one fills the gap.
            moved = int(self._tokens[len(self._places)])
            self._tokens[place] = moved
            self._places[moved] = place
