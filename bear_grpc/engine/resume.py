"""Takes up an answer where another worker was cut off.

Draws depend on seed and position alone, so only what has a memory of the tokens before is
run through them again: the text, the constraint, and in the engine the penalties.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..backend.base import Matcher, Vocabulary
from ..errors import BackendError
from ..protocol import Resume
from .sequence import Sequence
from .stop import TextMachine


def take_up(
    sequence: Sequence,
    resume: Resume,
    vocabulary: Vocabulary,
    make_text: Callable[[], TextMachine],
) -> None:
    """Brings a sequence that has its prompt only to where `resume` stands.

    Raises BackendError for what this model cannot have said.
    """
    ids = np.frombuffer(resume.tokens[: len(resume.tokens) // 4 * 4], "<i4").tolist()
    if len(ids) * 4 != len(resume.tokens) or not all(0 <= id < vocabulary.size for id in ids):
        raise BackendError("the tokens to go on from are none of this model")
    _echo(sequence, resume, vocabulary)
    # If the last of them has ended it and only the ending was lost, it is drawn again.
    ids = ids[: max(0, sequence.max_tokens - 1)] if len(ids) >= sequence.max_tokens else ids
    matcher = sequence.matcher
    while True:
        sequence.text = make_text()
        sequence.matcher = None if matcher is None else matcher.copy()
        length = _replay(sequence.text, sequence.matcher, ids, vocabulary)
        if length is not None:
            break
        ids = ids[:-1]
    if length > resume.text_length:
        raise BackendError("the text to go on from is not that of its tokens")
    sequence.text.skip(resume.text_length - length)
    sequence.tokens += ids
    sequence.num_charged = len(sequence.tokens)  # it has had them already
    sequence.state = resume.state
    sequence.admitted_s, sequence.first_token_s = resume.admitted_s, resume.first_token_s


def _echo(sequence: Sequence, resume: Resume, vocabulary: Vocabulary) -> None:
    if sequence.echo is not None:
        told = sequence.tokens[: resume.echoed]
        sequence.echo.push([vocabulary.piece(id) for id in told], is_last=len(told) == sequence.num_prompt)


def _replay(text: TextMachine, matcher: Matcher | None, ids: list[int], vocabulary: Vocabulary) -> int | None:
    """The length of the text that these tokens have shown; None if they end it."""
    length = 0
    for id in ids:
        shown, matched = text.push(vocabulary.piece(id))
        length += len(shown)
        if matcher is not None:
            matcher.accept(id)
        if matched is not None or (matcher is not None and matcher.is_finished()):
            return None
    return length
