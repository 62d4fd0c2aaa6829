"""llama.cpp's filters in plain numpy: the same candidates, slowly."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..backend.base import Ids, Logits, Sampler, Vocabulary
from ..params import SamplerKind, SamplingParams
from .vocabulary import FakeVocabulary

_Values = NDArray[np.float64]
_Places = NDArray[np.intp]
# Less likely candidates have no weight in llama.cpp's float32.
_WEIGHTLESS = 80.0


class FakeSampler(Sampler):
    """The filters of one sequence, over the whole row. Not used after `close`."""

    def __init__(self, params: SamplingParams, vocabulary: Vocabulary | None = None) -> None:
        """`vocabulary` has the tokens of DRY's sequence breakers; by default those of FakeVocabulary."""
        self._params = params
        self._seen: list[int] = []
        self._breakers: dict[int, list[list[int]]] = {}
        if params.uses_dry:
            self._breakers = _breakers(vocabulary or FakeVocabulary(), params.dry_sequence_breakers)
        self.closed = False

    def candidates(self, logits: Logits, *, xtc: bool = False) -> tuple[Ids, Logits]:
        """Tokens that may be drawn, most likely first, and their changed logits."""
        self._check_open()
        values = logits.astype(np.float64)
        for token, bias in self._params.logit_bias:
            values[token] += bias
        ids = np.flatnonzero(values > -np.inf)
        values = values[ids]
        for kind in self._params.filters:
            if len(ids) == 0 or (kind is SamplerKind.XTC and not xtc):
                continue
            values = self._changed(kind, ids, values)
            kept = self._kept(kind, values)
            ids, values = ids[kept], values[kept]
        order = np.argsort(-values, kind="stable")
        return ids[order].astype(np.int32), values[order].astype(np.float32)

    def accept(self, token: int) -> None:
        """Counts a token as seen."""
        self._check_open()
        self._seen.append(token)

    def close(self) -> None:
        """Ends it; closing twice would free memory twice in llama.cpp."""
        self._check_open()
        self.closed = True

    def _changed(self, kind: SamplerKind, ids: _Places, values: _Values) -> _Values:
        """Logits after a filter that changes them."""
        params = self._params
        if kind is SamplerKind.PENALTIES:
            counts = collections.Counter(_last(self._seen, params.repetition_window))
            seen = np.array([counts[token] for token in ids.tolist()])
            factor = np.where(values <= 0, params.repetition_penalty, 1 / params.repetition_penalty)
            penalty = seen * params.frequency_penalty + params.presence_penalty
            changed: _Values = np.where(seen > 0, values * factor - penalty, values)
            return changed
        if kind is SamplerKind.DRY:
            lowered = self._repetitions()
            return values - np.array([lowered.get(token, 0.0) for token in ids.tolist()], np.float64)
        if kind is SamplerKind.TEMPERATURE:
            return _heated(values, params)
        return values

    def _kept(self, kind: SamplerKind, values: _Values) -> _Places:
        """Places that a filter leaves."""
        params = self._params
        order = np.argsort(-values, kind="stable")
        if kind is SamplerKind.TOP_N_SIGMA:
            return np.flatnonzero(values >= values.max() - params.top_n_sigma * values.std())
        if kind is SamplerKind.TOP_K:
            return order[: params.top_k]
        if kind is SamplerKind.TYPICAL_P:
            return _typical(values, params.typical_p, params.min_keep)
        if kind is SamplerKind.TOP_P:
            enough = int(np.searchsorted(np.cumsum(_softmax(values[order])), params.top_p)) + 1
            return order[: max(enough, params.min_keep)]
        if kind is SamplerKind.MIN_P:
            near = int((values >= values.max() + math.log(params.min_p)).sum())
            return order[: max(near, params.min_keep)]
        if kind is SamplerKind.XTC:
            removed = int((_softmax(values) >= params.xtc_threshold).sum()) - 1
            return order[removed:] if removed > 0 and len(order) - removed >= params.min_keep else order
        return np.flatnonzero(values > -np.inf)

    def _repetitions(self) -> dict[int, float]:
        """By how much DRY lowers which token."""
        params = self._params
        lowered: dict[int, float] = {}
        last = _last(self._seen, params.dry_window)
        allowed = params.dry_allowed_length
        if len(last) <= allowed:
            return {}
        limit = self._unbroken(last)
        highest = int(88.7228391 / math.log(params.dry_base)) if params.dry_base > 1.000001 else 0
        for end in range(1, len(last)):
            length = 0
            while length < min(end, limit) and last[end - 1 - length] == last[len(last) - 1 - length]:
                length += 1
            token = last[end]
            if length >= allowed and [] not in self._breakers.get(token, []):
                exponent = min(length - allowed, highest) if highest else length - allowed
                penalty = params.dry_multiplier * params.dry_base**exponent
                lowered[token] = max(lowered.get(token, 0.0), penalty)
        return lowered

    def _unbroken(self, last: Sequence[int]) -> int:
        """How many of the last tokens come after the last sequence breaker."""
        for start in reversed(range(len(last))):
            tails = [
                tail
                for tail in self._breakers.get(last[start], [])
                if list(last[start + 1 : start + 1 + len(tail)]) == tail
            ]
            if tails:
                return len(last) - 1 - start - max(map(len, tails))
        return len(last)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the sampler is closed")


def _last(seen: Sequence[int], window: int) -> Sequence[int]:
    return seen if window < 0 else seen[max(0, len(seen) - window) :]


def _breakers(vocabulary: Vocabulary, texts: Sequence[str]) -> dict[int, list[list[int]]]:
    """Tokens that begin a sequence breaker, each with the tokens that must follow it."""
    found: dict[int, list[list[int]]] = {}
    for text in (text.encode() for text in texts):
        for token in range(vocabulary.size):
            piece = vocabulary.piece(token, special=True)
            if text in piece:
                found.setdefault(token, []).append([])
                continue
            for size in range(1, min(len(text), len(piece) + 1)):
                if piece.endswith(text[:size]):
                    rest = text[size:].decode(errors="replace")
                    tail = vocabulary.tokenize(rest, add_special=False, parse_special=False)
                    found.setdefault(token, []).append(tail[:20])
    return found


def _softmax(values: _Values) -> _Values:
    weights = np.exp(values - values.max())
    result: _Values = weights / weights.sum()
    return result


def _typical(values: _Values, p: float, min_keep: int) -> _Places:
    """Places of the candidates whose surprise is closest to the mean, until they sum above p."""
    places = np.flatnonzero(values >= values.max() - _WEIGHTLESS)
    chances = _softmax(values[places])
    surprise = -np.log(chances)
    order = np.argsort(np.abs(surprise - (chances * surprise).sum()), kind="stable")
    enough = int(np.searchsorted(np.cumsum(chances[order]), p, side="right")) + 1
    return places[order[: max(enough, min_keep)]]


def _heated(values: _Values, params: SamplingParams) -> _Values:
    """Logits over the temperature, which moves with the entropy if it has a range."""
    temperature, spread = params.temperature, params.dynamic_temperature_range
    if spread > 0:
        if len(values) == 1:
            return values
        chances = _softmax(values)
        chances = chances[chances > 0]
        entropy = max(0.0, float(-(chances * np.log(chances)).sum()) / math.log(len(values)))
        low, high = max(0.0, temperature - spread), temperature + spread
        temperature = low + (high - low) * entropy**params.dynamic_temperature_exponent
    if temperature <= 0:
        return np.where(np.arange(len(values)) == values.argmax(), values, -np.inf)
    return values / temperature
