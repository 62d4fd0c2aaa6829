"""What a computed row means for its sequence: the next token, text, events, the ending.

Owner thread only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ..backend.base import Backend, Ids, Logits
from ..protocol import Delta, Finished, SequenceEvent, Token, TopToken
from ..types import FinishReason, StopCause
from .logprobs import logprobs
from .plan import PlanItem
from .sequence import Sequence

# A prompt told in one piece would make a message that clients refuse by default.
ECHO_TOKENS = 1024


@dataclasses.dataclass(slots=True, frozen=True)
class Ending:
    """How a sequence ends well; `silent_token` ended it and is not part of the text."""

    reason: FinishReason
    cause: StopCause | None = None
    silent_token: Token | None = None


class Delivery:
    """Draws tokens and tells events. `tell` takes each event in order."""

    def __init__(
        self, backend: Backend, clock: Callable[[], float], tell: Callable[[SequenceEvent], None]
    ) -> None:
        self._backend = backend
        self._vocabulary = backend.vocabulary
        self._clock = clock
        self._tell = tell
        self._ends = np.array(backend.vocabulary.eog_tokens(), np.int32)

    def draw(self, sequence: Sequence, row: int) -> Ending | None:
        """The next token of a sequence, told; its ending if that is one.

        Raises ConstraintDeadEnd, ConstraintTooCostly.
        """
        sampler = sequence.sampler
        assert sampler is not None
        began = self._clock()
        logits = self._backend.logits(row)
        token = sampler.choose(logits, len(sequence.tokens), self._banned(sequence))
        told = self._token(sequence, token, logits) if sequence.output.wants_tokens else None
        sampler.accept(token)
        now = self._clock()
        sequence.sampling_s += now - began
        sequence.tokens.append(token)
        sequence.first_token_s = sequence.first_token_s or now
        sequence.last_token_s = now
        sequence.credit -= 1
        if sequence.credit <= 0:
            sequence.stalled_since_s = now
        return self._take(sequence, token, told)

    def finish(self, sequence: Sequence, ending: Ending) -> Finished:
        """The last event of a sequence, after the text that was held back."""
        reason, cause = ending.reason, ending.cause
        if cause is None or cause.sequence is None:
            text, matched = sequence.text.flush()
            if matched is not None:
                reason, cause = FinishReason.STOP, StopCause(sequence=matched)
            silent = ending.silent_token
            if text or silent is not None:
                tokens = [silent] if silent is not None and sequence.output.wants_tokens else []
                self._tell(Delta(sequence.id, text, 0 if silent is None else 1, tokens))
        satisfied = None if sequence.sampler is None else sequence.sampler.satisfied
        timings = sequence.timings(self._clock())
        return Finished(sequence.id, reason, cause, sequence.usage, timings, satisfied)

    def echo(self, sequence: Sequence, upto: int) -> None:
        """Tells the prompt's tokens before position `upto`, once each, without log probabilities."""
        echo = sequence.echo
        while echo is not None and echo.told < upto:
            start = echo.told
            ids = sequence.tokens[start : min(upto, start + ECHO_TOKENS)]
            told = [Token(token, self._vocabulary.piece(token, special=True)) for token in ids]
            self._tell_echo(sequence, ids, told)

    def echo_rows(self, item: PlanItem, last_row: int) -> None:
        """Tells prompt tokens with the log probabilities that the item's rows gave to them."""
        sequence = item.sequence
        self.echo(sequence, 1)
        assert sequence.echo is not None
        # A row tells about the token after its own. What was told before a preemption is not told again.
        start = max(item.start + 1, sequence.echo.told)
        end = min(item.start + item.count + 1, sequence.num_prompt)
        ids = sequence.tokens[start:end]
        row_of_start = last_row - item.count + start - item.start
        told = [
            self._token(sequence, token, self._backend.logits(row))
            for row, token in enumerate(ids, row_of_start)
        ]
        if ids:
            self._tell_echo(sequence, ids, told)

    def _tell_echo(self, sequence: Sequence, ids: list[int], told: list[Token]) -> None:
        assert sequence.echo is not None
        is_last = sequence.echo.told + len(ids) >= sequence.num_prompt
        text = sequence.echo.push([self._vocabulary.piece(token) for token in ids], is_last=is_last)
        if text or sequence.output.wants_tokens:
            tokens = told if sequence.output.wants_tokens else []
            self._tell(Delta(sequence.id, text, 0, tokens, echoed=sequence.echo.told))

    def _banned(self, sequence: Sequence) -> Ids | None:
        """What may not be drawn now: ends, while there are too few tokens."""
        if sequence.num_completion >= sequence.stop.min_tokens:
            return None
        if not sequence.stop.token_ids:
            return self._ends
        return np.concatenate([self._ends, np.array(sequence.stop.token_ids, np.int32)])

    def _take(self, sequence: Sequence, token: int, told: Token | None) -> Ending | None:
        if self._vocabulary.is_eog(token) and not sequence.stop.ignore_eos:
            return Ending(FinishReason.STOP, StopCause(eog_token=token), told or Token(token, b""))
        if token in sequence.stop.token_ids:
            return Ending(FinishReason.STOP, StopCause(token_id=token), told or Token(token, b""))
        text, matched = sequence.text.push(self._vocabulary.piece(token))
        state = None if sequence.sampler is None else sequence.sampler.state
        self._tell(Delta(sequence.id, text, 1, [] if told is None else [told], [token], state))
        if matched is not None:
            return Ending(FinishReason.STOP, StopCause(sequence=matched))
        if sequence.sampler is not None and sequence.sampler.finished:
            return Ending(FinishReason.STOP)
        if sequence.num_completion >= sequence.max_tokens:
            return Ending(FinishReason.LENGTH)
        return None

    def _token(self, sequence: Sequence, token: int, logits: Logits) -> Token:
        piece = self._vocabulary.piece(token, special=True)
        if not sequence.output.wants_logprobs:
            return Token(token, piece)
        own, best = logprobs(logits, token, sequence.output.top_logprobs)
        top = [TopToken(id, self._vocabulary.piece(id, special=True), value) for id, value in best]
        return Token(token, piece, own, top)
