"""How a prompt and its completion share the context."""

from __future__ import annotations

import dataclasses

from ..errors import ContextLengthExceeded
from ..params import OverflowPolicy


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Tokens of a context, and of the completion: as asked for, else at most the default."""

    context_length: int
    asked_max_tokens: int | None
    default_max_tokens: int

    def max_tokens(self, num_prompt: int) -> int:
        """Most tokens to produce after a prompt of this length.

        Raises ContextLengthExceeded if the asked ones do not fit, or not a single one.
        """
        room = self.context_length - num_prompt
        if self.asked_max_tokens is not None:
            if self.asked_max_tokens > room:
                raise ContextLengthExceeded(num_prompt, self.asked_max_tokens, self.context_length)
            return self.asked_max_tokens
        if room < 1:
            raise ContextLengthExceeded(num_prompt, None, self.context_length)
        return min(self.default_max_tokens, room)

    def fit(self, tokens: list[int], policy: OverflowPolicy, *, bos: int) -> list[int]:
        """The prompt, or as much of it as the policy keeps if it leaves too little room.

        A `bos` at its beginning is always kept. Raises ContextLengthExceeded.
        """
        if policy is OverflowPolicy.ERROR or self._fits(len(tokens)):
            self.max_tokens(len(tokens))
            return tokens
        room = self.context_length - self._wanted
        head = tokens[:1] if tokens[0] == bos else []
        if room <= len(head):
            raise ContextLengthExceeded(len(tokens), self.asked_max_tokens, self.context_length)
        left = room - len(head)
        before = left // 2 if policy is OverflowPolicy.TRUNCATE_MIDDLE else 0
        rest = tokens[len(head) :]
        return head + rest[:before] + rest[len(rest) - (left - before) :]

    def _fits(self, num_prompt: int) -> bool:
        return num_prompt + self._wanted <= self.context_length

    @property
    def _wanted(self) -> int:
        """What a cut prompt must leave: the default is only a wish, so at most half of the context."""
        if self.asked_max_tokens is not None:
            return self.asked_max_tokens
        return max(1, min(self.default_max_tokens, self.context_length // 2))
