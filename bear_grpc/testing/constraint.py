"""Texts that a constraint allows, without a model."""

from __future__ import annotations

import random

import numpy as np

from ..backend.base import Matcher, Vocabulary

# Bytes that end what was begun, in JSON and in most texts, from the best on.
_CLOSING = b'"}]'


def write(matcher: Matcher, vocabulary: Vocabulary, *, seed: int = 0, hurry_after: int = 40) -> bytes:
    """A text of tokens that the matcher's masks allow, up to an end-of-generation token.

    After `hurry_after` tokens every other one is the shortest way out: an end,
    else a token that closes something. Raises RuntimeError after 50 times as many.
    """
    draw = random.Random(seed)
    ends = vocabulary.eog_tokens()
    flat = np.zeros(vocabulary.size, np.float32)
    text = b""
    for place in range(50 * hurry_after):
        allowed: list[int] = np.flatnonzero(matcher.mask(flat) == 0).tolist()
        hurries = place >= hurry_after
        token = _way_out(allowed, vocabulary) if hurries and draw.random() < 0.5 else None
        token = draw.choice(allowed) if token is None else token
        matcher.accept(token)
        if token in ends:
            return text
        text += vocabulary.piece(token)
    raise RuntimeError(f"no end after {len(text)} bytes: {text[:200]!r}")


def _way_out(allowed: list[int], vocabulary: Vocabulary) -> int | None:
    """The token of these that brings the text nearest to its end; None if none does."""
    for token in vocabulary.eog_tokens():
        if token in allowed:
            return token
    pieces = {vocabulary.piece(token): token for token in allowed}
    closing = [bytes([byte]) for byte in _CLOSING if bytes([byte]) in pieces]
    return pieces[closing[0]] if closing else None
