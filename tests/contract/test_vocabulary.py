"""Tokens and text: what goes in comes out, and ids out of range are errors."""

from __future__ import annotations

import pytest

from bear_grpc.backend.base import Backend

TEXTS = [
    "hello world",
    "  two  spaces ",
    "line\nline\ttab",
    "naïve café, 北京, 🐻‍❄️, العربية",
    "e\u0301 \ufffd \u200b",
    "\x00\x01\x7f",
    "<s> <|end|> </s>",
    "x" * 500,
]


def plain(backend: Backend, text: str) -> list[int]:
    return backend.vocabulary.tokenize(text, add_special=False, parse_special=False)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_tokenized_and_joined_again_is_itself(backend, text):
    vocabulary = backend.vocabulary
    joined = b"".join(vocabulary.piece(token) for token in plain(backend, text)).decode()
    assert joined == (" " + text if vocabulary.adds_space_prefix else text)


def test_text_empty_has_no_tokens(backend):
    assert plain(backend, "") == []


def test_tokens_are_in_range(backend):
    for text in TEXTS:
        assert all(0 <= token < backend.vocabulary.size for token in plain(backend, text))


def test_special_tokens_are_added_only_if_asked_for(backend):
    vocabulary = backend.vocabulary
    added = vocabulary.tokenize("hello", add_special=True, parse_special=False)
    assert added[-len(plain(backend, "hello")) :] == plain(backend, "hello")
    assert vocabulary.piece(added[0], special=True).decode() == vocabulary.special_text("bos")


def test_control_text_is_one_token_only_if_parsed(backend):
    vocabulary = backend.vocabulary
    text = vocabulary.special_text("eos")
    parsed = vocabulary.tokenize(text, add_special=False, parse_special=True)
    assert vocabulary.piece(parsed[-1], special=True).decode() == text
    assert parsed[-1] not in plain(backend, text)


def test_control_texts_hold_bos_and_eos(backend):
    vocabulary = backend.vocabulary
    assert {vocabulary.special_text("bos"), vocabulary.special_text("eos")} <= vocabulary.control_texts()


def test_control_texts_of_any_kind_never_come_from_unparsed_text(backend):
    vocabulary = backend.vocabulary
    for text in vocabulary.control_texts():
        [token] = vocabulary.tokenize(text, add_special=False, parse_special=True)[-1:]
        assert token not in plain(backend, text)


def test_control_token_has_no_bytes_unless_special(backend):
    vocabulary = backend.vocabulary
    [eos] = vocabulary.tokenize(vocabulary.special_text("eos"), add_special=False, parse_special=True)[-1:]
    assert vocabulary.piece(eos) == b""
    assert vocabulary.piece(eos, special=True) == vocabulary.special_text("eos").encode()


def test_eog_tokens_are_those_that_is_eog_holds_for(backend):
    vocabulary = backend.vocabulary
    holds = tuple(token for token in range(vocabulary.size) if vocabulary.is_eog(token))
    assert vocabulary.eog_tokens() == holds != ()


def test_eos_ends_a_generation_and_bos_does_not(backend):
    vocabulary = backend.vocabulary
    [eos] = vocabulary.tokenize(vocabulary.special_text("eos"), add_special=False, parse_special=True)[-1:]
    [bos] = vocabulary.tokenize(vocabulary.special_text("bos"), add_special=False, parse_special=True)[-1:]
    assert vocabulary.is_eog(eos)
    assert not vocabulary.is_eog(bos)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("past", [-1, 0, 2**31])
def test_piece_of_a_token_out_of_range_raises(backend, past, special):
    token = -1 if past < 0 else backend.vocabulary.size + past
    with pytest.raises(IndexError, match=str(token)):
        backend.vocabulary.piece(token, special=special)


@pytest.mark.parametrize("past", [-1, 0, 2**31])
def test_is_eog_of_a_token_out_of_range_does_not_hold(backend, past):
    token = -1 if past < 0 else backend.vocabulary.size + past
    assert not backend.vocabulary.is_eog(token)
