"""One sequence's choice of tokens: filters, constraint, and the draw.

Draws keep no generator. Their random numbers depend on the seed, what they
are for and the position alone, so a sequence that is computed again goes on
as it began.
"""

from __future__ import annotations

import numpy as np

from ..backend.base import Ids, Logits, Matcher, Sampler
from ..errors import ConstraintDeadEnd, ModelOutputInvalid
from ..params import SamplingParams
from .draws import AdaptiveP, Mirostat, SteeredDraw, place_of

_MASK = 2**64 - 1
# What a random number is for, the second argument of `uniform`.
_DRAW, _XTC = 0, 1
# After the constraint has refused the first draw: that this one was refused must not bias the next.
_DRAW_AGAIN = 2


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
    return int(ids[place_of(logits, at)])


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the maximum of the logits and their biases is the answer, without any filter."""
    return params.is_greedy and not params.filters


class TokenSampler:
    """Chooses the tokens of one sequence. Owner thread only; not used after `close`.

    Equal arguments, tokens accepted before and `state` give the same token,
    wherever they are computed. Of equally likely tokens greedy takes the
    lowest id.
    """

    def __init__(
        self, params: SamplingParams, filters: Sampler | None, matcher: Matcher | None = None
    ) -> None:
        """`filters` is None where `is_plain_greedy`. The seed is that of this branch."""
        self._params = params
        self._filters = filters
        self._matcher = matcher
        self._is_greedy, self._uses_xtc = params.is_greedy, params.uses_xtc
        self._steered: SteeredDraw | None = None
        if params.mirostat and not params.is_greedy:
            self._steered = Mirostat(params)
        elif params.adaptive_p_target is not None and not params.is_greedy:
            self._steered = AdaptiveP(params)

    @property
    def state(self) -> float | None:
        """What mirostat or adaptive-p has learnt from accepted tokens; None without them."""
        return None if self._steered is None else self._steered.state

    @state.setter
    def state(self, value: float | None) -> None:
        if self._steered is not None and value is not None:
            self._steered.state = value

    @property
    def satisfied(self) -> bool | None:
        """Whether the text so far is complete by the constraint; None without one."""
        return None if self._matcher is None else self._matcher.is_satisfied()

    @property
    def finished(self) -> bool:
        """Whether the constraint allows nothing more."""
        return self._matcher is not None and self._matcher.is_finished()

    def choose(self, logits: Logits, position: int, banned: Ids | None = None) -> int:
        """The next token, at `position` of its sequence, which is none of `banned`.

        `logits` (n_vocab,) is not changed. The constraint is asked about the
        chosen token alone; only if that is refused, all tokens are checked.
        Nothing is counted: see `accept`. Raises ConstraintDeadEnd if no token
        can be chosen, ConstraintTooCostly, ModelOutputInvalid without a usable logit.
        """
        row = logits
        if banned is not None and len(banned):
            row = logits.copy()
            row[banned] = -np.inf
        token = self._pick(row, position, _DRAW)
        matcher = self._matcher
        if matcher is not None and token is not None and not matcher.allows(token):
            token = self._pick(matcher.mask(row), position, _DRAW_AGAIN)
        if token is None:
            if np.isnan(logits).any() or not np.isfinite(logits).any():
                raise ModelOutputInvalid()
            raise ConstraintDeadEnd("every token that may come next is ruled out")
        return token

    def accept(self, token: int) -> None:
        """Counts a chosen token, and goes on in the constraint. Raises ConstraintTooCostly.

        The end-of-generation token that ends a sequence may be accepted or
        not, as it suits the caller: where one can be chosen, the constraint
        takes it.
        """
        if self._filters is not None:
            self._filters.accept(token)
        if self._steered is not None:
            self._steered.accept(token)
        if self._matcher is not None:
            self._matcher.accept(token)

    def accept_prompt(self, tokens: list[int]) -> None:
        """Counts tokens before the first chosen one; the constraint begins after them."""
        window = self._params.seen_window
        if self._filters is None or window == 0:
            return
        for token in tokens if window < 0 else tokens[-window:]:
            self._filters.accept(token)

    def close(self) -> None:
        """Frees the filters."""
        if self._filters is not None:
            self._filters.close()
            self._filters = None

    def _pick(self, row: Logits, position: int, purpose: int) -> int | None:
        """A token whose logit is above -inf; None if there is none."""
        if self._filters is None:
            return self._maximum(row)
        params = self._params
        xtc = self._uses_xtc and uniform(params.seed, _XTC, position) < params.xtc_probability
        ids, logits = self._filters.candidates(row, xtc=xtc)
        best = logits.max() if len(logits) else -np.inf
        if best == -np.inf:
            # Nothing is left, or DRY has lowered all of it beyond float32.
            return self._maximum(row)
        if self._is_greedy:
            return int(ids[logits == best].min())
        at = uniform(params.seed, purpose, position)
        if self._steered is not None and best < np.inf:
            return self._steered.draw(ids, logits, at, len(row))
        return draw(ids, logits, at)

    def _maximum(self, row: Logits) -> int | None:
        """The token of the largest logit after the biases; None if all are -inf or no numbers."""
        if self._params.logit_bias:
            row = row.copy()
            for token, bias in self._params.logit_bias:
                row[token] += bias
        token = int(row.argmax())
        if np.isnan(row[token]):
            token = int(np.fmax(row, -np.inf).argmax())
        return token if row[token] > -np.inf else None
