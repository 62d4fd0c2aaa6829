"""TextMachine: the text does not depend on where the borders between tokens lie."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.engine.stop import TextMachine

# Few letters, so that stop sequences occur, overlap and begin again; one of them takes three bytes.
LETTERS = "ab€ "
TEXTS = st.text(LETTERS, max_size=16)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3).map(tuple)


def run(pieces: list[bytes], stops: tuple[str, ...], *, strip_space: bool = False) -> tuple[str, str | None]:
    """All text shown, and the stop sequence that ended it."""
    machine = TextMachine(stops, strip_space=strip_space)
    shown = ""
    for piece in pieces:
        text, stop = machine.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    text, stop = machine.flush()
    return shown + text, stop


def expected(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """By definition: the first end of a stop sequence in the text; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 48), max_size=8)


@settings(max_examples=300)
@given(text=TEXTS, stops=STOPS, cuts=CUTS)
def test_text_any_borders_give_the_text_before_the_first_stop(text, stops, cuts):
    assert run(pieces_of(text.encode(), cuts), stops) == expected(text, stops)


@settings(max_examples=200)
@given(data=st.binary(max_size=16), stops=STOPS, cuts=CUTS)
def test_text_any_bytes_and_borders_give_what_the_whole_gives(data, stops, cuts):
    assert run(pieces_of(data, cuts), stops) == expected(data.decode(errors="replace"), stops)


@settings(max_examples=200)
@given(text=TEXTS, stops=STOPS)
def test_text_held_back_is_the_longest_beginning_of_a_stop_and_no_more(text, stops):
    machine, shown = TextMachine(stops), ""
    for end, character in enumerate(text, start=1):
        more, stop = machine.push(character.encode())
        shown += more
        if stop is not None:
            return
        ends = [n for each in stops for n in range(1, len(each)) if text[:end].endswith(each[:n])]
        assert shown == text[: end - max(ends, default=0)]


@given(text=TEXTS, cuts=CUTS)
def test_text_without_stops_is_shown_as_soon_as_a_character_is_whole(text, cuts):
    machine, given_bytes, shown = TextMachine(), b"", ""
    for piece in pieces_of(text.encode(), cuts):
        given_bytes += piece
        shown += machine.push(piece)[0]
        assert shown == given_bytes.decode(errors="ignore")


def test_text_every_split_of_a_long_character_shows_it_once_whole():
    data = "🐻".encode()
    for cut in range(1, 4):
        machine = TextMachine()
        assert machine.push(data[:cut]) == ("", None)
        assert machine.push(data[cut:]) == ("🐻", None)


def test_text_held_back_comes_when_the_stop_does_not():
    machine = TextMachine(("END",))
    assert machine.push(b"xE") == ("x", None)
    assert machine.push(b"N") == ("", None)
    assert machine.push(b"x") == ("ENx", None)


def test_text_a_failed_beginning_that_holds_another_keeps_the_later_one():
    machine = TextMachine(("aab",))
    assert machine.push(b"aaa") == ("a", None)
    assert machine.push(b"b") == ("", "aab")


def test_text_of_two_stops_the_one_that_ends_first_wins():
    assert run([b"xabcdx"], ("abcd", "bc")) == ("xa", "bc")


def test_text_of_two_stops_that_end_together_the_longer_wins():
    assert run([b"xabcx"], ("bc", "abc")) == ("x", "abc")


def test_text_after_the_stop_in_the_same_piece_is_dropped():
    assert run([b"oneSTOPtwo"], ("STOP",)) == ("one", "STOP")


def test_flush_held_beginning_of_a_stop_is_shown():
    machine = TextMachine(("END",))
    machine.push(b"EN")
    assert machine.flush() == ("EN", None)


def test_flush_half_a_character_becomes_a_replacement():
    machine = TextMachine()
    assert machine.push(b"a\xe2\x82") == ("a", None)
    assert machine.flush() == ("\ufffd", None)


def test_flush_replacement_that_completes_a_stop_matches():
    machine = TextMachine(("x\ufffd",))
    machine.push(b"ax\xe2")
    assert machine.flush() == ("", "x\ufffd")


@pytest.mark.parametrize(("given_text", "shown"), [(" a b", "a b"), ("  a", " a"), ("a", "a"), (" ", "")])
def test_strip_space_drops_one_space_at_the_beginning_only(given_text, shown):
    pieces = [bytes([byte]) for byte in given_text.encode()]
    assert run(pieces, (), strip_space=True) == (shown, None)


def test_strip_space_after_an_empty_piece_still_drops_it():
    assert run([b"", b" a"], (), strip_space=True) == ("a", None)
