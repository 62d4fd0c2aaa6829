"""A model's tokens, by llama.cpp's vocabulary calls."""

from __future__ import annotations

import collections
import ctypes
import threading
from typing import Any

import numpy as np

from ..errors import InvalidField
from ..params import Constraint
from .base import Matcher
from .constraint import Compiler
from .native import lib, meta

_ATTR_UNKNOWN, _ATTR_CONTROL = 1, 1 << 3

CHEAP_TEXT_BYTES = 64 * 2**10
MAX_UNKNOWN_COST = 2 * 10**10
MAX_CONTROL_COST = 2 * 10**9


class LlamaVocabulary:
    """A model's tokens. Vocabulary calls of llama.cpp are safe from every thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocab = lib.llama_model_get_vocab(model)
        self.size: int = lib.llama_vocab_n_tokens(self._vocab)
        self._is_spm = meta(model, "tokenizer.ggml.model") == "llama"
        declared = meta(model, "tokenizer.ggml.add_space_prefix")
        # SentencePiece vocabularies add the space unless they say otherwise.
        self.adds_space_prefix = self._is_spm and declared != "false"
        self.bos_token: int = lib.llama_vocab_bos(self._vocab)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._single_characters: frozenset[str] | None = None
        self._control: frozenset[str] | None = None
        self._eog: tuple[int, ...] | None = None
        self._compiler: Compiler | None = None
        self._compiler_lock = threading.Lock()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        if len(data) > CHEAP_TEXT_BYTES:
            self._check_unknown(text, len(data))
            if parse_special:
                self._check_controls(text, len(data))
        capacity = len(data) + 8
        while True:
            ids = np.empty(capacity, np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = lib.llama_tokenize(
                self._vocab, data, len(data), pointer, capacity, add_special, parse_special
            )
            if count >= 0:
                tokens: list[int] = ids[:count].tolist()
                return tokens
            if count == -(2**31):
                too_many = f"Failed to tokenize prompt: {len(data)} bytes give too many tokens"
                raise InvalidField("text", too_many)
            capacity = -count

    def _check_controls(self, text: str, size: int) -> None:
        """Refuses what looking for control tokens would take seconds for.

        llama.cpp (tokenizer_st_partition) copies the rest of the text at every one that it finds.
        """
        found = sum(text.count(control) for control in self.control_texts())
        if found * size > MAX_CONTROL_COST:
            limit = MAX_CONTROL_COST // size
            raise InvalidField("input", f"{found} control tokens; {size} bytes may hold {limit} of them")

    def _check_unknown(self, text: str, size: int) -> None:
        """Refuses what a SentencePiece vocabulary would take seconds for, in one call that nothing stops.

        llama.cpp (llm_tokenizer_spm::resegment) copies its whole output for every character without a
        token of its own: characters times length is the cost, about 2e10 a second on a server's core.
        """
        if not self._is_spm:
            return
        if self._single_characters is None:
            texts = (lib.llama_vocab_get_text(self._vocab, token) for token in range(self.size))
            decoded = (text.decode(errors="replace").replace("\u2581", " ") for text in texts)
            self._single_characters = frozenset(text for text in decoded if len(text) == 1)
        counts = collections.Counter(text)
        unknown = sum(
            count for character, count in counts.items() if character not in self._single_characters
        )
        if unknown * size > MAX_UNKNOWN_COST:
            limit = MAX_UNKNOWN_COST // size
            raise InvalidField(
                "input",
                f"{unknown} characters have no token of their own; {size} bytes may hold {limit} of them",
            )

    def piece(self, token: int, *, special: bool = False) -> bytes:
        known = self._pieces.get((token, special))
        if known is None:
            known = self._pieces[token, special] = self._read_piece(token, special)
        return known

    def _read_piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.size:  # llama.cpp would end the process
            raise IndexError(f"token {token} of a vocabulary of {self.size}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def is_eog(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def eog_tokens(self) -> tuple[int, ...]:
        if self._eog is None:
            self._eog = tuple(token for token in range(self.size) if self.is_eog(token))
        return self._eog

    def control_texts(self) -> frozenset[str]:
        if self._control is None:
            texts = set()
            for token in range(self.size):
                if lib.llama_vocab_get_attr(self._vocab, token) & (_ATTR_CONTROL | _ATTR_UNKNOWN):
                    texts.add(lib.llama_vocab_get_text(self._vocab, token).decode(errors="replace"))
            self._control = frozenset(texts - {""})
        return self._control

    def special_text(self, which: str) -> str:
        token = {"bos": lib.llama_vocab_bos, "eos": lib.llama_vocab_eos}[which](self._vocab)
        return self.piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    def chat_template(self) -> str | None:
        template = lib.llama_model_chat_template(self._model, None)
        return template.decode(errors="replace") if template else None

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of a text; the first call reads all tokens (0.2 s for 32,000)."""
        with self._compiler_lock:
            if self._compiler is None:
                pieces = [self.piece(token) for token in range(self.size)]
                self._compiler = Compiler(pieces, self.eog_tokens())
        return self._compiler.compile(constraint)
