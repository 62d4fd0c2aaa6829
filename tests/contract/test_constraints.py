"""Constrained texts: what a matcher allows is what the constraint says, with every vocabulary."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from bear_grpc.backend.base import Backend, Matcher
from bear_grpc.errors import ConstraintDeadEnd, GrammarInvalid
from bear_grpc.params import Constraint, ConstraintKind
from bear_grpc.testing.constraint import write

SCHEMA = json.dumps(
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
# Prefixes of each other, every kind of escape, text that looks like grammar, characters of many bytes.
CHOICES = (
    "yes",
    "yes, please",
    "ye",
    'q"\\\n\t\0',
    r"\u0041\x41\n",
    "/x*/ | y",
    "日本🐻",
    "é",
    "{}",
    "<|end|>",
)
CONSTRAINTS = {
    "schema": Constraint(ConstraintKind.JSON_SCHEMA, SCHEMA),
    "regex": Constraint(ConstraintKind.REGEX, r"(GET|POST) /[a-zé日🐻/]{1,9}\?id=\d{2,4}"),
    "choices": Constraint(ConstraintKind.CHOICES, choices=CHOICES),
    "lark": Constraint(ConstraintKind.LARK, 'start: "<" word ("," word)~0..2 ">"\nword: /[a-c]{1,3}|é/'),
    "gbnf": Constraint(ConstraintKind.GBNF, 'root ::= "<" item{1,3} ">"\nitem ::= [0-9]+ " " | "é"'),
}
EVERY_KIND = pytest.mark.parametrize("kind", CONSTRAINTS)


def is_right(kind: str, text: str) -> bool:
    if kind == "schema":
        value = json.loads(text)
        is_whole = list(value) == ["name", "age"] and isinstance(value["age"], int)
        return is_whole and value["age"] >= 0 and len(value["name"]) <= 8
    if kind == "choices":
        return text in CHOICES
    pattern = {
        "regex": CONSTRAINTS["regex"].text,
        "lark": "<([a-c]{1,3}|é)(,([a-c]{1,3}|é)){0,2}>",
        "gbnf": "<([0-9]+ |é){1,3}>",
    }[kind]
    return re.fullmatch(pattern, text) is not None


def start(backend: Backend, kind: str) -> Matcher:
    return backend.vocabulary.compile(CONSTRAINTS[kind])


def flat(backend: Backend) -> np.ndarray:
    return np.zeros(backend.vocabulary.size, np.float32)


def byte_tokens(backend: Backend, text: str) -> list[int]:
    """Tokens of the text's single bytes: every vocabulary here has them."""
    vocabulary = backend.vocabulary
    tokens = {vocabulary.piece(token): token for token in range(vocabulary.size)}
    return [tokens[bytes([byte])] for byte in text.encode()]


@EVERY_KIND
def test_text_drawn_from_masks_is_what_the_constraint_says(backend, kind):
    matcher = start(backend, kind)
    for seed in range(8):
        text = write(matcher.copy(), backend.vocabulary, seed=seed).decode()
        assert is_right(kind, text), text


@EVERY_KIND
def test_mask_leaves_the_logits_of_exactly_the_tokens_that_are_allowed(backend, kind):
    vocabulary, matcher = backend.vocabulary, start(backend, kind)
    logits = np.linspace(-9, 9, vocabulary.size).astype(np.float32)
    before = logits.copy()
    for _ in range(40):
        masked = matcher.mask(logits)
        allowed = [matcher.allows(token) for token in range(vocabulary.size)]
        assert (masked[allowed] == logits[allowed]).all()
        assert np.isneginf(masked[np.logical_not(allowed)]).all()
        if matcher.is_finished():
            break
        matcher.accept(int(masked.argmax()))
    assert (logits == before).all()
    assert masked.dtype == np.float32


@EVERY_KIND
def test_end_tokens_are_allowed_exactly_where_the_text_is_complete(backend, kind):
    vocabulary, matcher = backend.vocabulary, start(backend, kind)
    text = write(matcher.copy(), vocabulary, seed=3)
    assert not matcher.is_satisfied()
    for token in [*byte_tokens(backend, text.decode()), None]:
        masked = matcher.mask(flat(backend))
        for end in vocabulary.eog_tokens():
            assert matcher.allows(end) == matcher.is_satisfied() == (masked[end] == 0)
        if token is not None:
            assert matcher.allows(token)
            matcher.accept(token)
    assert matcher.is_satisfied()


def test_every_end_token_ends_the_text_and_only_ends_follow(backend):
    vocabulary = backend.vocabulary
    for end in vocabulary.eog_tokens():
        matcher = vocabulary.compile(Constraint(ConstraintKind.REGEX, "a+"))
        [a] = byte_tokens(backend, "a")
        matcher.accept(a)
        assert not matcher.is_finished()
        matcher.accept(end)
        assert matcher.is_finished()
        assert matcher.is_satisfied()
        assert not matcher.allows(a)
        assert set(np.flatnonzero(matcher.mask(flat(backend)) == 0)) == set(vocabulary.eog_tokens())
        assert matcher.copy().is_finished()
        matcher.accept(end)
        with pytest.raises(ConstraintDeadEnd):
            matcher.accept(a)


def test_text_that_nothing_may_follow_is_finished_before_an_end_token(backend):
    matcher = backend.vocabulary.compile(Constraint(ConstraintKind.CHOICES, choices=("ab", "abc")))
    finished = []
    for token in byte_tokens(backend, "abc"):
        matcher.accept(token)
        finished.append((matcher.is_satisfied(), matcher.is_finished()))
    assert finished == [(False, False), (True, False), (True, True)]


def test_control_tokens_are_no_text(backend):
    vocabulary = backend.vocabulary
    matcher = vocabulary.compile(Constraint(ConstraintKind.REGEX, r"(?s).+"))
    masked = matcher.mask(flat(backend))
    silent = [token for token in range(vocabulary.size) if not vocabulary.piece(token)]
    assert set(vocabulary.eog_tokens()) <= set(silent)
    assert np.isneginf(masked[silent]).all()
    assert not any(matcher.allows(token) for token in silent)


def test_text_of_a_control_token_is_written_by_other_tokens(backend):
    vocabulary = backend.vocabulary
    for control in sorted(vocabulary.control_texts()):
        matcher = vocabulary.compile(Constraint(ConstraintKind.CHOICES, choices=(control,)))
        assert write(matcher, vocabulary).decode() == control


def test_tokens_inside_a_character_are_allowed(backend):
    matcher = backend.vocabulary.compile(Constraint(ConstraintKind.REGEX, "[é🐻]{2}"))
    tokens = byte_tokens(backend, "🐻é")
    for place, token in enumerate(tokens):
        assert not matcher.is_satisfied(), place
        assert matcher.allows(token)
        matcher.accept(token)
    assert matcher.is_finished()


@pytest.mark.parametrize("chosen", CHOICES, ids=ascii)
def test_every_choice_can_be_written_however_it_is_cut(backend, chosen):
    vocabulary = backend.vocabulary
    cuts = [byte_tokens(backend, chosen)]
    if not vocabulary.adds_space_prefix:
        cuts.append(vocabulary.tokenize(chosen, add_special=False, parse_special=False))
    for tokens in cuts:
        matcher = start(backend, "choices")
        for token in tokens:
            assert matcher.allows(token)
            matcher.accept(token)
        assert matcher.is_satisfied()


def test_copies_go_different_ways(backend):
    matcher = start(backend, "choices")
    texts = {write(matcher.copy(), backend.vocabulary, seed=seed) for seed in range(12)}
    assert len(texts) > 3
    assert not matcher.is_satisfied()


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(ConstraintKind.JSON_SCHEMA, '{"not": {}}'),
        Constraint(ConstraintKind.REGEX, "("),
        Constraint(ConstraintKind.CHOICES),
        Constraint(ConstraintKind.LARK, "begin: 1"),
        Constraint(ConstraintKind.GBNF, "root"),
    ],
    ids=lambda constraint: constraint.kind.value,
)
def test_constraint_that_does_not_compile_is_invalid(backend, constraint):
    with pytest.raises(GrammarInvalid):
        backend.vocabulary.compile(constraint)
