"""The filters of one sequence: llama.cpp's samplers without the draw.

Only the candidates that can matter are handed to llama.cpp where the filters
allow to tell them before.
"""

from __future__ import annotations

import collections
import ctypes
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..errors import EngineStartFailed
from ..params import SamplerKind, SamplingParams
from .base import Ids, Logits
from .native import lib
from .prefilter import LEAST_DIVISOR, SeenTokens, few, limit_of, log_mass_without

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
# Candidates this far below the best have no weight in float32, and the entropy of typical_p takes
# the logarithm of it.
_WEIGHTLESS = 80.0
_KEPT_DRY = 8
_LOG_MAX = 700.0
_NOTHING = np.empty(0, np.int32)


class _Array(ctypes.Structure):
    """llama_token_data_array, with the address as a number: a pointer is slow to read."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


def _bind(name: str, second: Any) -> Any:
    """A function of a sampler and one argument, which takes addresses as numbers."""
    function = lib._lib[name]
    function.restype, function.argtypes = None, [ctypes.c_void_p, second]
    return function


class Candidates:
    """The array that samplers work on; one for all sequences, they take turns."""

    def __init__(self, n_vocab: int) -> None:
        self._store = np.zeros(n_vocab, _CANDIDATE)
        self._ids, self._logits = self._store["id"], self._store["logit"]
        self._all_ids = np.arange(n_vocab, dtype=np.int32)
        self._begin = self._store.ctypes.data
        self._array = _Array()
        self._address = ctypes.addressof(self._array)
        self._apply = _bind("llama_sampler_apply", ctypes.c_void_p)
        self.accept = _bind("llama_sampler_accept", ctypes.c_int32)
        self._dry: collections.OrderedDict[tuple[Any, ...], Any] = collections.OrderedDict()

    def fill(self, logits: Logits, ids: Any) -> int:
        """Starts with the tokens of `ids`, all if it is None, that have a logit; gives their number."""
        if ids is None and not logits.min() > -np.inf:
            # Not a number fails this too, and is never drawn.
            ids = np.flatnonzero(logits > -np.inf)
        if ids is None:
            size = len(logits)
            self._ids[:] = self._all_ids
            self._logits[:] = logits
        else:
            size = len(ids)
            self._ids[:size] = ids
            np.fmax(logits[ids], -np.inf, out=self._logits[:size])
        array = self._array
        array.data, array.size, array.selected, array.sorted = self._begin, size, -1, False
        return size

    def apply(self, member: int) -> None:
        """Runs a sampler over what is left; there must be something."""
        self._apply(member, self._address)

    def drop(self, gap: float) -> None:
        """Removes those that are -inf or more than `gap` below the best, unless that is all."""
        begin, end = self._bounds()
        logits = self._logits[begin:end]
        best = float(logits.max())
        places = np.flatnonzero(logits > -np.inf if gap == math.inf else logits >= best - gap)
        if 0 < len(places) < end - begin:
            self._store[begin : begin + len(places)] = self._store[begin:end][places]
            self._array.size = len(places)

    def keep_likely(self, p: float, min_keep: int, log_mass: float) -> bool:
        """top_p where tokens of `log_mass` were left out; False, and no change, if it needs some of them."""
        begin, end = self._bounds()
        logits = self._logits[begin:end].astype(np.float64)
        order = (-logits).argsort(kind="stable")
        best = logits[order[0]]
        sums = np.exp(logits[order] - best).cumsum()
        wanted = p * (sums[-1] + np.exp(min(log_mass - best, _LOG_MAX)))
        count = max(int(sums.searchsorted(wanted)) + 1, min_keep)
        if count > len(order):
            return False
        self._store[begin : begin + count] = self._store[begin:end][order[:count]]
        self._array.size, self._array.sorted = count, True
        return True

    def take(self) -> tuple[Ids, Logits]:
        """Ids and logits of what is left, as copies."""
        begin, end = self._bounds()
        return self._ids[begin:end].copy(), self._logits[begin:end].copy()

    def make_dry(self, vocab: Any, params: SamplingParams, window: int) -> Any:
        """A DRY sampler. The search of the vocabulary for sequence breakers is kept for the next one."""
        strength = (params.dry_multiplier, params.dry_base, params.dry_allowed_length, window)
        key = (*strength, params.dry_sequence_breakers)
        first = self._dry.pop(key, None)
        if first is None:
            texts = [text.encode() for text in params.dry_sequence_breakers]
            breakers = (ctypes.c_char_p * len(texts))(*texts)
            first = lib.llama_sampler_init_dry(vocab, *strength, breakers, len(texts))
            if len(self._dry) >= _KEPT_DRY:
                lib.llama_sampler_free(self._dry.popitem(last=False)[1])
        self._dry[key] = first
        return lib.llama_sampler_clone(first)

    def _bounds(self) -> tuple[int, int]:
        """Where in the store the array stands: filters move its beginning and its end."""
        begin = (self._array.data - self._begin) // _CANDIDATE.itemsize
        end = begin + self._array.size
        assert 0 <= begin <= end <= len(self._store)
        return begin, end


class _Step(NamedTuple):
    """A sampler, and how far below the best candidates are dropped before and after it."""

    member: int
    is_xtc: bool = False
    gap_before: float | None = None
    gap_after: float | None = None
    is_top_p: bool = False


class LlamaSampler:
    """See `backend.base.Sampler`. With temperature 0 the best candidate is among the few that are given."""

    def __init__(
        self,
        params: SamplingParams,
        candidates: Candidates,
        *,
        vocab: Any,
        n_vocab: int,
        context_length: int,
        prefilter: bool = True,
    ) -> None:
        """`vocab` is llama.cpp's; biased tokens are below `n_vocab`. Raises EngineStartFailed.

        Without `prefilter` llama.cpp gets every row whole, for the same result.
        """
        self._shared = candidates
        self._top_p, self._min_keep = params.top_p, params.min_keep
        self._owned: list[Any] = []
        self._steps: list[_Step] = []
        self._counting: list[int] = []
        biases: dict[int, float] = collections.defaultdict(float)
        for token, bias in params.logit_bias:
            biases[token] += bias
        self._biased = np.fromiter(biases, np.int32, len(biases))
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))
        # A window longer than the context would only take memory: llama.cpp allocates all of it.
        most = context_length

        def clamp(window: int) -> int:
            return most if window < 0 else min(window, most)

        self._limit = limit_of(params) if prefilter else None
        window = clamp(params.seen_window)
        self._seen = SeenTokens(window) if self._limit is not None and window else None
        for kind, member in self._members(params, clamp, vocab, n_vocab):
            if not member:
                self.close()
                raise EngineStartFailed("a sampler could not be made")
            self._owned.append(member)
            self._steps.append(self._step(kind, member, params))

    def _members(
        self, params: SamplingParams, clamp: Any, vocab: Any, n_vocab: int
    ) -> Iterator[tuple[SamplerKind, Any]]:
        for kind in params.filters:
            match kind:
                case SamplerKind.PENALTIES:
                    member = lib.llama_sampler_init_penalties(
                        n_vocab,
                        clamp(params.repetition_window),
                        max(params.repetition_penalty, LEAST_DIVISOR),
                        params.frequency_penalty,
                        params.presence_penalty,
                    )
                case SamplerKind.DRY:
                    member = self._shared.make_dry(vocab, params, clamp(params.dry_window))
                case SamplerKind.TOP_N_SIGMA:
                    member = lib.llama_sampler_init_top_n_sigma(params.top_n_sigma)
                case SamplerKind.TOP_K:
                    member = lib.llama_sampler_init_top_k(params.top_k)
                case SamplerKind.TYPICAL_P:
                    member = lib.llama_sampler_init_typical(params.typical_p, params.min_keep)
                case SamplerKind.TOP_P:
                    member = lib.llama_sampler_init_top_p(params.top_p, params.min_keep)
                case SamplerKind.MIN_P:
                    member = lib.llama_sampler_init_min_p(params.min_p, params.min_keep)
                case SamplerKind.XTC:
                    # With a chance of 1 it works whenever it is run.
                    member = lib.llama_sampler_init_xtc(1.0, params.xtc_threshold, params.min_keep, 0)
                case SamplerKind.TEMPERATURE:
                    member = lib.llama_sampler_init_temp_ext(
                        max(params.temperature, LEAST_DIVISOR),
                        params.dynamic_temperature_range,
                        params.dynamic_temperature_exponent,
                    )
            yield kind, member

    def _step(self, kind: SamplerKind, pointer: Any, params: SamplingParams) -> _Step:
        member = ctypes.cast(pointer, ctypes.c_void_p).value
        assert member is not None
        match kind:
            case SamplerKind.PENALTIES | SamplerKind.DRY:
                self._counting.append(member)
            case SamplerKind.XTC:
                return _Step(member, is_xtc=True)
            case SamplerKind.TOP_P:
                return _Step(member, is_top_p=True)
            case SamplerKind.TYPICAL_P:
                return _Step(member, gap_before=_WEIGHTLESS)
            case SamplerKind.TOP_N_SIGMA:
                return _Step(member, gap_after=math.inf)
            case SamplerKind.TEMPERATURE if params.dynamic_temperature_range > 0:
                return _Step(member, gap_after=math.inf)
        return _Step(member)

    def candidates(self, logits: Logits, *, xtc: bool = False) -> tuple[Ids, Logits]:
        if len(self._biased):
            logits = logits.copy()
            logits[self._biased] += self._biases
        ids, log_mass = None, None
        if self._limit is not None:
            ids = few(logits, self._limit, _NOTHING if self._seen is None else self._seen.tokens)
            if ids is not None and self._limit.divisor is not None:
                log_mass = log_mass_without(logits, ids, self._limit.divisor)
        if not self._filter(logits, ids, log_mass, xtc):
            self._filter(logits, None, None, xtc)
        return self._shared.take()

    def _filter(self, logits: Logits, ids: Any, log_mass: float | None, xtc: bool) -> bool:
        """Runs the filters over `ids`, beside which `log_mass` counts; False if more ids are needed."""
        shared = self._shared
        if not shared.fill(logits, ids):
            return True
        for member, is_xtc, gap_before, gap_after, is_top_p in self._steps:
            if is_xtc and not xtc:
                continue
            if is_top_p and log_mass is not None:
                if not shared.keep_likely(self._top_p, self._min_keep, log_mass):
                    return False
                continue
            if gap_before is not None:
                shared.drop(gap_before)
            shared.apply(member)
            if gap_after is not None:
                shared.drop(gap_after)
        return True

    def accept(self, token: int) -> None:
        for member in self._counting:
            self._shared.accept(member, token)
        if self._seen is not None:
            self._seen.add(token)

    def close(self) -> None:
        while self._owned:
            lib.llama_sampler_free(self._owned.pop())
