"""Snapshots of ended sequences: within their bytes, in the order of use."""

from __future__ import annotations

import pytest

from bear_grpc.engine import snapshots
from bear_grpc.engine.snapshots import Snapshot, Snapshots

MANY = 1000


def snapshot(tokens: list[int], *, scope: str = "", size: int = 10) -> Snapshot:
    return Snapshot(tokens, scope, bytes(size))


def filled(*kept: Snapshot, most_bytes: int = MANY, can_cut: bool = True) -> Snapshots:
    made = Snapshots(most_bytes, can_cut=can_cut)
    for each in kept:
        made.add(each)
    return made


def test_find_gives_the_longest_common_beginning():
    short, long = snapshot([1, 2, 9]), snapshot([1, 2, 3, 4, 8])
    assert filled(short, long).find([1, 2, 3, 4, 5], "", 5) == (long, 4)
    assert filled(short, long).find([1, 2, 9, 9], "", 5) == (short, 3)


def test_find_is_bounded_by_what_may_be_taken():
    kept = snapshot([1, 2, 3])
    assert filled(kept).find([1, 2, 3], "", 2) == (kept, 2)


@pytest.mark.parametrize(("tokens", "scope"), [([9, 2, 3], ""), ([1, 2, 3], "other")])
def test_find_of_nothing_alike_or_of_another_scope_is_none(tokens, scope):
    assert filled(snapshot([1, 2, 3])).find(tokens, scope, 3) == (None, 0)


def test_has_is_true_of_what_one_begins_with():
    made = filled(snapshot([1, 2, 3]))
    assert made.has([1, 2, 3], "")
    assert made.has([1, 2], "")
    assert not made.has([1, 2, 3, 4], "")
    assert not made.has([1, 3], "")
    assert not made.has([1, 2], "other")


def test_add_replaces_those_of_its_scope_that_it_goes_on_from():
    made = filled(
        snapshot([1, 2]), snapshot([1, 3]), snapshot([1, 2], scope="other"), snapshot([1, 2, 3], size=20)
    )
    assert (made.tokens, made.bytes) == (2 + 2 + 3, 10 + 10 + 20)
    assert made.has([1, 3], "")
    assert made.has([1, 2], "other")


def test_add_beyond_the_bytes_drops_those_used_longest_ago():
    first, second, third = (snapshot([token] * 4) for token in (1, 2, 3))
    made = filled(first, second, most_bytes=20)
    made.touch(first)
    made.add(third)
    assert [made.has(each.tokens, "") for each in (first, second, third)] == [True, False, True]
    assert (made.tokens, made.bytes) == (8, 20)


def test_add_of_one_larger_than_all_the_bytes_changes_nothing():
    made = filled(snapshot([1, 2]), most_bytes=20)
    made.add(snapshot([1, 2, 3], size=21))
    assert (made.tokens, made.bytes) == (2, 10)


def test_add_keeps_no_more_than_can_be_looked_through(monkeypatch):
    monkeypatch.setattr(snapshots, "MOST_SNAPSHOTS", 2)
    made = filled(*(snapshot([token]) for token in (1, 2, 3)))
    assert [made.has([token], "") for token in (1, 2, 3)] == [False, True, True]
    assert (made.tokens, made.bytes) == (2, 20)


# ---- states that cannot be cut ----------------------------------------------------------------------


def test_find_of_states_that_cannot_be_cut_gives_only_one_that_is_taken_whole():
    short, long = snapshot([1, 2]), snapshot([1, 2, 3, 4])
    made = filled(short, long, can_cut=False)
    assert made.find([1, 2, 3, 9], "", 4) == (short, 2)
    assert made.find([1, 2, 3, 4, 5], "", 5) == (long, 4)
    assert made.find([1, 2, 3, 4], "", 1) == (None, 0)


def test_has_of_states_that_cannot_be_cut_is_true_of_the_same_tokens_only():
    made = filled(snapshot([1, 2, 3]), can_cut=False)
    assert made.has([1, 2, 3], "")
    assert not made.has([1, 2], "")
