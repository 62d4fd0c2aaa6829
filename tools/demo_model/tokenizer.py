"""SentencePiece-style tokenizer: trains the vocabulary and encodes as llama.cpp's `llm_tokenizer_spm` does.

Knows vocabulary and text only. Token order fixes the ids: unk, bos, eos, 256 bytes, control tokens, pieces.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

SPACE = "\u2581"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTROL = (SYSTEM, USER, ASSISTANT, END)
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
RESERVED = (UNK, BOS, EOS, *BYTES, *CONTROL)

# Pieces never cross these borders. Each piece therefore lies inside one word, and words can be
# encoded one by one: llama.cpp's merging over the whole text gives the same result.
_WORD = re.compile(f"{SPACE}?[A-Za-z]+|{SPACE}?[0-9]|{SPACE}?[^A-Za-z0-9{SPACE}]|{SPACE}")


class Tokenizer:
    """Vocabulary with `encode` and `decode`; `pieces` are the learned tokens in order of merging."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.tokens: list[str] = [*RESERVED, *pieces]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.bos, self.eos = self.ids[BOS], self.ids[EOS]
        self.end = self.ids[END]
        self.role = {"system": self.ids[SYSTEM], "user": self.ids[USER], "assistant": self.ids[ASSISTANT]}
        self.newline = self.ids["<0x0A>"]
        self._byte0 = self.ids[BYTES[0]]
        self._first_piece = len(RESERVED)
        self._encode_word = lru_cache(maxsize=65536)(self._merge_word)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def scores(self) -> list[float]:
        """Merge priorities: an earlier piece merges first; reserved tokens never merge."""
        return [0.0] * self._first_piece + [-float(rank + 1) for rank in range(len(self.pieces))]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and without reading control tokens out of it."""
        out: list[int] = []
        for word in _WORD.findall(text.replace(" ", SPACE)):
            out.extend(self._encode_word(word))
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens are skipped, broken UTF-8 is replaced."""
        raw = bytearray()
        for index in ids:
            if self._byte0 <= index < self._byte0 + 256:
                raw.append(index - self._byte0)
            elif index >= self._first_piece:
                raw += self.tokens[index].replace(SPACE, " ").encode()
        return raw.decode("utf-8", "replace")

    def _merge_word(self, word: str) -> tuple[int, ...]:
        symbols = list(word)
        while len(symbols) > 1:
            # The smallest id among pieces is the highest score; min() keeps the leftmost of equals.
            ranked = [
                (self.ids.get(left + right, len(self.tokens)), at)
                for at, (left, right) in enumerate(pairwise(symbols))
            ]
            best, at = min(ranked)
            if best == len(self.tokens):
                break
            symbols[at : at + 2] = [self.tokens[best]]
        out: list[int] = []
        for symbol in symbols:
            if symbol in self.ids:
                out.append(self.ids[symbol])
            else:
                out.extend(self._byte0 + value for value in symbol.encode())
        return tuple(out)

    def save(self, path: Path) -> None:
        """Writes the learned pieces as JSON."""
        path.write_text(json.dumps(self.pieces, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads what `save` wrote."""
        return cls(json.loads(path.read_text(encoding="utf-8")))


def train_tokenizer(texts: Iterable[tuple[str, int]], size: int) -> Tokenizer:
    """Learns byte-pair pieces from weighted texts until the vocabulary holds `size` tokens.

    Printable ASCII comes first, so plain English never needs byte tokens.
    """
    counts: Counter[str] = Counter()
    for text, weight in texts:
        for word in _WORD.findall(text.replace(" ", SPACE)):
            counts[word] += weight
    pieces = [SPACE, *(chr(code) for code in range(0x21, 0x7F))]
    known = set(pieces)
    words = {word: list(word) for word in counts}
    while len(RESERVED) + len(pieces) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        # Ties go to the smaller pair, so the vocabulary depends on the texts alone.
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = left + right
        if merged not in known:
            pieces.append(merged)
            known.add(merged)
        for symbols in words.values():
            at = 0
            while at < len(symbols) - 1:
                if symbols[at] == left and symbols[at + 1] == right:
                    symbols[at : at + 2] = [merged]
                at += 1
    return Tokenizer(pieces)
