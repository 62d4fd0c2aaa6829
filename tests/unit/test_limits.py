"""How a prompt and its completion share the context."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.errors import ContextLengthExceeded
from bear_grpc.params import OverflowPolicy
from bear_grpc.worker.limits import Limits

BOS = 999
ERROR, LEFT, MIDDLE = OverflowPolicy.ERROR, OverflowPolicy.TRUNCATE_LEFT, OverflowPolicy.TRUNCATE_MIDDLE


def limits(context: int = 20, asked: int | None = None, default: int = 4) -> Limits:
    return Limits(context, asked, default)


@pytest.mark.parametrize(
    ("asked", "num_prompt", "given"),
    [(None, 5, 4), (None, 18, 2), (None, 19, 1), (15, 5, 15), (0, 5, 0), (0, 20, 0)],
)
def test_max_tokens_are_the_asked_ones_or_at_most_the_default(asked, num_prompt, given):
    assert limits(asked=asked).max_tokens(num_prompt) == given


@pytest.mark.parametrize(("asked", "num_prompt"), [(None, 20), (None, 21), (16, 5), (1, 20), (0, 21)])
def test_max_tokens_without_room_raise_with_the_numbers(asked, num_prompt):
    with pytest.raises(ContextLengthExceeded) as caught:
        limits(asked=asked).max_tokens(num_prompt)
    assert caught.value.metadata["prompt_token_count"] == str(num_prompt)
    assert caught.value.metadata["context_length"] == "20"
    assert caught.value.metadata.get("max_tokens") == (None if asked is None else str(asked))


@pytest.mark.parametrize("policy", OverflowPolicy)
@pytest.mark.parametrize("asked", [None, 4])
def test_fit_of_a_prompt_that_leaves_room_changes_nothing(policy, asked):
    assert limits(asked=asked).fit(list(range(16)), policy, bos=BOS) == list(range(16))


def test_fit_by_error_takes_a_prompt_that_leaves_less_than_the_default():
    assert limits().fit(list(range(19)), ERROR, bos=BOS) == list(range(19))


@pytest.mark.parametrize(("asked", "length"), [(None, 20), (5, 16)])
def test_fit_by_error_refuses_a_prompt_without_room(asked, length):
    with pytest.raises(ContextLengthExceeded):
        limits(asked=asked).fit(list(range(length)), ERROR, bos=BOS)


def test_fit_truncates_left_to_the_end_of_the_prompt():
    assert limits().fit(list(range(30)), LEFT, bos=BOS) == list(range(14, 30))


def test_fit_truncates_the_middle_and_keeps_both_ends():
    assert limits().fit(list(range(30)), MIDDLE, bos=BOS) == [*range(8), *range(22, 30)]


def test_fit_truncates_an_odd_room_with_more_of_the_end():
    assert limits(asked=5).fit(list(range(30)), MIDDLE, bos=BOS) == [*range(7), *range(22, 30)]


@pytest.mark.parametrize(
    ("policy", "kept"), [(LEFT, range(15, 30)), (MIDDLE, [*range(1, 8), *range(22, 30)])], ids=str
)
def test_fit_always_keeps_a_bos_at_the_beginning(policy, kept):
    assert limits().fit([BOS, *range(1, 30)], policy, bos=BOS) == [BOS, *kept]


def test_fit_keeps_no_token_that_is_bos_elsewhere():
    assert limits().fit([1, BOS, *range(2, 30)], LEFT, bos=BOS) == list(range(14, 30))


def test_fit_truncates_for_at_most_half_of_the_context_as_a_default():
    assert len(limits(default=512).fit(list(range(30)), LEFT, bos=BOS)) == 10


def test_fit_truncates_for_max_tokens_0_to_the_whole_context():
    assert limits(asked=0).fit(list(range(30)), LEFT, bos=BOS) == list(range(10, 30))


@pytest.mark.parametrize(("asked", "first"), [(20, 0), (21, 0), (19, BOS)])
@pytest.mark.parametrize("policy", [LEFT, MIDDLE])
def test_fit_that_would_leave_nothing_of_the_prompt_raises(asked, first, policy):
    with pytest.raises(ContextLengthExceeded):
        limits(asked=asked).fit([first, *range(1, 30)], policy, bos=BOS)


@given(
    context=st.integers(1, 40),
    asked=st.none() | st.integers(0, 40),
    default=st.integers(1, 40),
    length=st.integers(1, 60),
    policy=st.sampled_from(OverflowPolicy),
    has_bos=st.booleans(),
)
def test_fit_gives_a_prompt_that_max_tokens_accepts_or_raises(
    context, asked, default, length, policy, has_bos
):
    made = Limits(context, asked, default)
    tokens = [BOS if has_bos else 0, *range(1, length)]
    wanted = max(1, min(default, context // 2)) if asked is None else asked
    try:
        kept = made.fit(tokens, policy, bos=BOS)
    except ContextLengthExceeded:
        left = context - wanted
        assert (
            left <= has_bos if policy is not ERROR else length > left or (asked is None and length >= context)
        )
        return
    assert 1 <= len(kept) <= length
    assert len(kept) + made.max_tokens(len(kept)) <= context
    assert kept[-1] == tokens[-1] or len(kept) < 2
    assert sorted(set(kept)) == sorted(kept)
    assert [token for token in tokens if token in kept] == kept
    assert not has_bos or kept[0] == BOS
    # A cut prompt uses all that it may.
    assert len(kept) in (length, context - wanted)
