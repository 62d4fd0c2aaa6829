"""The filters of one sequence: a chain of llama.cpp's samplers without the draw."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import EngineStartFailed
from ..types import SamplingParams
from .base import Ids, Logits
from .native import lib

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Candidates:
    """The array that chains work on; one for all sequences, they take turns."""

    def __init__(self, n_vocab: int) -> None:
        self._store = np.zeros(n_vocab, _CANDIDATE)
        self._all_ids = np.arange(n_vocab, dtype=np.int32)
        self._array = lib.llama_token_data_array()

    def filter(self, chain: Any, logits: Logits) -> tuple[Ids, Logits]:
        """Ids and logits that `chain` leaves of a row, as copies."""
        store, array = self._store, self._array
        store["id"] = self._all_ids
        store["logit"] = logits
        array.data = ctypes.cast(store.ctypes.data, lib.llama_token_data_p)
        array.size, array.selected, array.sorted = len(store), -1, False
        lib.llama_sampler_apply(chain, ctypes.byref(array))
        # Filters may shrink the array, reorder it, or point it at memory of their own.
        address = ctypes.cast(array.data, ctypes.c_void_p).value
        assert address is not None
        raw: Any = (ctypes.c_char * (array.size * _CANDIDATE.itemsize)).from_address(address)
        left = np.frombuffer(raw, _CANDIDATE)
        return left["id"].copy(), left["logit"].copy()


class LlamaSampler:
    """See `backend.base.Sampler`."""

    def __init__(
        self, params: SamplingParams, candidates: Candidates, *, n_vocab: int, context_length: int
    ) -> None:
        self._candidates = candidates
        self._counts = params.uses_penalties
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for member in self._members(params, n_vocab, context_length):
            if not member:
                self.close()
                raise EngineStartFailed("a sampler could not be made")
            lib.llama_sampler_chain_add(self._chain, member)

    @staticmethod
    def _members(params: SamplingParams, n_vocab: int, context_length: int) -> Iterator[Any]:
        """In llama-server's order; the bias goes first, while ids are still in order."""
        if params.logit_bias:
            biases = (lib.llama_logit_bias * len(params.logit_bias))(*params.logit_bias)
            yield lib.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)
        if params.uses_penalties:
            window = params.repetition_window
            yield lib.llama_sampler_init_penalties(
                n_vocab,
                context_length if window < 0 else window,
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        if params.temperature == 0:
            return
        if params.top_k > 0:
            yield lib.llama_sampler_init_top_k(params.top_k)
        if params.typical_p < 1:
            yield lib.llama_sampler_init_typical(params.typical_p, 1)
        if params.top_p < 1:
            yield lib.llama_sampler_init_top_p(params.top_p, 1)
        if params.min_p > 0:
            yield lib.llama_sampler_init_min_p(params.min_p, 1)
        yield lib.llama_sampler_init_temp(params.temperature)

    def candidates(self, logits: Logits) -> tuple[Ids, Logits]:
        return self._candidates.filter(self._chain, logits)

    def accept(self, token: int) -> None:
        if self._counts:
            lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)
            self._chain = None
