"""Tokens that anybody can read: one for each byte, and a few control tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backend.base import Matcher, Vocabulary
from ..params import Constraint

if TYPE_CHECKING:
    from ..backend.constraint import Compiler

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_BYTES = 256


class FakeVocabulary(Vocabulary):
    """Tokens 0 to 255 are bytes; after them come BOS, EOS, and `controls` in order.

    `</s>` and, where it is one of the controls, `<|end|>` end a generation.
    """

    def __init__(
        self,
        *,
        controls: Sequence[str] = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        template: str | None = CHAT_TEMPLATE,
        adds_space_prefix: bool = False,
    ) -> None:
        self.adds_space_prefix = adds_space_prefix
        self.bos = self.bos_token = _BYTES
        self.eos = _BYTES + 1
        self._template = template
        self._texts = {_BYTES + place: text for place, text in enumerate(["<s>", "</s>", *controls])}
        self._ids = {text: token for token, text in self._texts.items()}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))))
        self.size = _BYTES + len(self._texts)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Bytes of the text; with `parse_special`, control texts as their tokens."""
        ids = [self.bos] if add_special else []
        start = 0
        for match in self._pattern.finditer(text) if parse_special else ():
            ids += [*text[start : match.start()].encode(), self._ids[match.group()]]
            start = match.end()
        return [*ids, *text[start:].encode()]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The byte, or the control text if `special`. Raises IndexError out of range."""
        if not 0 <= token < self.size:
            raise IndexError(f"token {token} of a vocabulary of {self.size}")
        if token < _BYTES:
            return bytes([token])
        return self._texts[token].encode() if special else b""

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return token in self.eog_tokens()

    def eog_tokens(self) -> tuple[int, ...]:
        """EOS and the token of `<|end|>`."""
        end = self._ids.get("<|end|>")
        return (self.eos,) if end is None else (self.eos, end)

    def control_texts(self) -> frozenset[str]:
        """The texts that `parse_special` recognises."""
        return frozenset(self._ids)

    def control(self, text: str) -> int:
        """The token of a control text. Raises KeyError if there is none."""
        return self._ids[text]

    def special_text(self, which: str) -> str:
        """Text of `bos` or `eos`."""
        return {"bos": "<s>", "eos": "</s>"}[which]

    def chat_template(self) -> str | None:
        """The template given at the start."""
        return self._template

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of a text. Raises GrammarInvalid."""
        return self._compiler.compile(constraint)

    @functools.cached_property
    def _compiler(self) -> Compiler:
        # llguidance is loaded only by those who constrain.
        from ..backend.constraint import Compiler

        return Compiler([self.piece(token) for token in range(self.size)], self.eog_tokens())
