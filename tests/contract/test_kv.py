"""What the engine relies on in the KV cache: copies, snapshots and cuts, by kind of model.

Sums are rounded by the shape of a batch and by the place of a token in the
cache, so "the same logits" allows what two ways of computing them from
scratch differ by (`expectation`); that is nothing for the fakes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from bear_grpc.backend.base import Backend, Outcome
from bear_grpc.testing import Misuse
from tests.contract.conftest import (
    BATCH,
    COPY,
    CUT,
    EVERY,
    LENGTH,
    MAX_SEQUENCES,
    MAY_REFUSE_A_PART,
    OPTIONS,
    OTHER,
    RECURRENT,
    SCRATCH,
    SOURCE,
    SPLIT,
    THAT_CUT,
    THAT_CUT_WHAT_IS_RESTORED,
    THAT_DO_NOT_CUT,
    WINDOWED,
    Expectation,
    Open,
    expectation,
    forward,
    logits,
    named,
    prompt,
    tokens_of,
    with_leftovers,
)  # fmt: skip
from tests.helpers.architectures import WINDOW


@pytest.fixture
def backend(name: str, open_backend: Open) -> Iterator[Backend]:
    """The backend `name` with an empty KV cache."""
    yield from with_leftovers(open_backend(name))


# ---- traits -----------------------------------------------------------------------------------------


@EVERY
def test_kv_traits_tell_what_the_model_and_the_options_make(backend, name):
    recurrent = name in RECURRENT
    unified = not recurrent and not name.endswith(SPLIT)
    kv = backend.kv
    assert (kv.can_cut, kv.unified, backend.options.kv_unified) == (not recurrent, unified, unified)
    assert kv.sequence_ids > MAX_SEQUENCES if unified else kv.sequence_ids == MAX_SEQUENCES
    assert kv.pool_tokens >= MAX_SEQUENCES * OPTIONS.context_length
    assert kv.sequence_ids <= backend.options.batch_tokens


@EVERY
def test_kv_of_the_last_sequence_id_works_as_that_of_the_first(backend):
    beginning, way, _ = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    last = backend.kv.sequence_ids - 1
    forward(backend, (last, 0, beginning, False))
    assert expected.agrees(logits(backend, last, LENGTH, way))


# ---- copies -----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("tail", [1, 8])
def test_kv_copy_whole_goes_on_as_from_scratch_and_so_does_its_source(backend, tail):
    beginning, way, other = tokens_of(backend, LENGTH, tail)
    expected = expectation(backend, beginning + way, tail)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_copy(SOURCE, COPY, LENGTH) is True
    assert [backend.kv_length(id) for id in (SOURCE, COPY)] == [LENGTH, LENGTH]
    forward(backend, (SOURCE, LENGTH, other, False))
    assert expected.agrees(logits(backend, COPY, LENGTH, way))
    expected = expectation(backend, beginning + other + way, tail)
    assert expected.agrees(logits(backend, SOURCE, LENGTH + tail, way))


@EVERY
def test_kv_copies_that_go_on_in_one_step_do_not_see_each_other(backend):
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_copy(SOURCE, COPY, LENGTH) is True
    outcome, rows = forward(backend, (SOURCE, LENGTH, other, True), (COPY, LENGTH, way, True))
    assert outcome is Outcome.DONE
    found = [backend.logits(row).copy() for row in rows]
    for row, tail in zip(found, (other, way), strict=True):
        assert expectation(backend, beginning + tail, 8).agrees(row)


@EVERY
def test_kv_copy_of_a_copy_goes_on_as_from_scratch(backend):
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_copy(SOURCE, COPY, LENGTH) is True
    assert backend.kv_copy(COPY, OTHER, LENGTH) is True
    forward(backend, (COPY, LENGTH, other, False))
    assert expected.agrees(logits(backend, OTHER, LENGTH, way))
    assert expected.agrees(logits(backend, SOURCE, LENGTH, way))


@THAT_CUT
@pytest.mark.parametrize("length", [CUT, 1])
def test_kv_copy_of_a_part_goes_on_as_from_scratch(backend, name, length):
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning[:length] + way, 8)
    untouched = expectation(backend, beginning + other, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    if backend.kv_copy(SOURCE, COPY, length):
        assert [backend.kv_length(id) for id in (SOURCE, COPY)] == [LENGTH, length]
        assert expected.agrees(logits(backend, COPY, length, way))
    else:
        assert name in MAY_REFUSE_A_PART
        assert backend.kv_length(COPY) == 0
    assert untouched.agrees(logits(backend, SOURCE, LENGTH, other))


@THAT_DO_NOT_CUT
def test_kv_copy_of_a_part_where_the_model_cannot_cut_is_refused(backend):
    beginning, way, _ = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    for length in (1, LENGTH - 1):
        assert backend.kv_copy(SOURCE, COPY, length) is False
        assert backend.kv_length(COPY) == 0
    assert expected.agrees(logits(backend, SOURCE, LENGTH, way))


@EVERY
def test_kv_copy_of_more_than_there_is_is_refused(backend):
    forward(backend, (SOURCE, 0, prompt(backend, 10), False))
    with contextlib.suppress(Misuse):
        assert backend.kv_copy(SOURCE, COPY, 11) is False
    assert [backend.kv_length(id) for id in (SOURCE, COPY)] == [10, 0]


# ---- removal beside copies --------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("removed", "kept"), [(SOURCE, COPY), (COPY, SOURCE)])
def test_kv_remove_of_one_of_two_copies_leaves_the_other(backend, removed, kept):
    """The room of the one that is gone is written over before the other goes on."""
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_copy(SOURCE, COPY, LENGTH) is True
    assert backend.kv_remove(removed, 0) is True
    assert [backend.kv_length(id) for id in (removed, kept)] == [0, LENGTH]
    forward(backend, (removed, 0, beginning[::-1] + other, False))
    assert expected.agrees(logits(backend, kept, LENGTH, way))


@THAT_CUT
@pytest.mark.parametrize(("cut", "kept"), [(SOURCE, COPY), (COPY, SOURCE)])
def test_kv_remove_of_the_end_of_one_of_two_copies_leaves_the_other(backend, name, cut, kept):
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    expected_of_cut = expectation(backend, beginning[:CUT] + other + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_copy(SOURCE, COPY, LENGTH) is True
    if not backend.kv_remove(cut, CUT):
        assert (cut, name in MAY_REFUSE_A_PART) == (COPY, True)
        assert backend.kv_length(cut) == LENGTH
        assert expected.agrees(logits(backend, cut, LENGTH, way))
        return
    forward(backend, (cut, CUT, other, False))
    assert expected.agrees(logits(backend, kept, LENGTH, way))
    assert expected_of_cut.agrees(logits(backend, cut, CUT + 8, way))


@THAT_DO_NOT_CUT
def test_kv_remove_of_the_end_where_the_model_cannot_cut_leaves_the_whole(backend):
    beginning, way, _ = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    for start in (1, CUT, LENGTH - 1):
        assert backend.kv_remove(SOURCE, start) is False
    assert backend.kv_length(SOURCE) == LENGTH
    assert backend.kv_remove(SOURCE, LENGTH) is True
    assert expected.agrees(logits(backend, SOURCE, LENGTH, way))


@EVERY
def test_kv_remove_of_the_whole_makes_place_for_another_sequence(backend):
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning[::-1] + other, False))
    assert backend.kv_remove(SOURCE, 0) is True
    forward(backend, (SOURCE, 0, beginning, False))
    assert expected.agrees(logits(backend, SOURCE, LENGTH, way))


# ---- snapshots --------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("target", [SOURCE, OTHER])
def test_kv_restore_of_what_was_saved_goes_on_as_from_scratch(backend, target):
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    saved = backend.kv_save(SOURCE)
    assert isinstance(saved, bytes)
    assert backend.kv_remove(SOURCE, 0) is True
    forward(backend, (COPY, 0, beginning[::-1] + other, False))
    assert backend.kv_restore(target, saved) is True
    assert backend.kv_length(target) == LENGTH
    assert expected.agrees(logits(backend, target, LENGTH, way))


@EVERY
def test_kv_save_leaves_the_sequence_and_can_be_restored_many_times(backend):
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    saved = backend.kv_save(SOURCE)
    assert backend.kv_restore(COPY, saved) is True
    forward(backend, (COPY, LENGTH, other, False))
    assert backend.kv_restore(OTHER, saved) is True
    for sequence_id in (SOURCE, OTHER):
        assert expected.agrees(logits(backend, sequence_id, LENGTH, way))


@EVERY
def test_kv_save_of_a_copy_at_once_is_that_of_its_source(backend):
    """llama.cpp copies between streams as late as in the next step: a snapshot must not be older."""
    beginning, way, _ = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_copy(SOURCE, COPY, LENGTH) is True
    assert backend.kv_restore(OTHER, backend.kv_save(COPY)) is True
    assert expected.agrees(logits(backend, OTHER, LENGTH, way))


@EVERY
def test_kv_restore_into_the_source_of_a_copy_at_once_leaves_the_copy(backend):
    """As above: what is copied is what the source had when it was asked for."""
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (OTHER, 0, beginning[::-1] + other, False))
    saved = backend.kv_save(OTHER)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_copy(SOURCE, COPY, LENGTH) is True
    assert backend.kv_remove(SOURCE, 0) is True
    assert backend.kv_restore(SOURCE, saved) is True
    assert expected.agrees(logits(backend, COPY, LENGTH, way))


@THAT_CUT_WHAT_IS_RESTORED
def test_kv_restore_can_be_cut_like_a_sequence_that_was_computed(backend):
    beginning, way, _ = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning[:CUT] + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_restore(COPY, backend.kv_save(SOURCE)) is True
    assert backend.kv_copy(COPY, OTHER, CUT) is True
    assert backend.kv_remove(COPY, CUT) is True
    for sequence_id in (COPY, OTHER):
        assert expected.agrees(logits(backend, sequence_id, CUT, way))


@EVERY
def test_kv_save_of_an_empty_sequence_is_empty_and_restores_nothing(backend):
    assert backend.kv_save(SOURCE) == b""
    assert backend.kv_restore(COPY, b"") is True
    assert backend.kv_length(COPY) == 0


# ---- a sliding window -------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("name", ["gemma2", f"gemma2{SPLIT}"])
@pytest.mark.parametrize("way_back", ["copy", "cut"])
def test_kv_far_behind_the_window_goes_on_as_from_scratch(name, way_back, open_backend):
    """llama.cpp may drop what no window sees any more (`swa_full` off), and then goes on from a beginning
    without the tokens before it, silently. The sequence is longer than all that it would keep."""
    pool = 4096
    backend = open_backend(name, context_length=pool // MAX_SEQUENCES)
    assert backend.kv.pool_tokens == pool
    length, cut = 1000, 100
    text = prompt(backend, 200)
    tokens = [text[at * at % 199] for at in range(length)]
    assert cut < length - WINDOW
    try:
        expected = expectation_of_long(backend, tokens[:cut], text[:8])
        read(backend, SOURCE, tokens)
        if way_back == "copy":
            copied = backend.kv_copy(SOURCE, COPY, cut)
            assert copied is (backend.kv_length(COPY) == cut)
            assert copied or name in MAY_REFUSE_A_PART
            assert not copied or expected.agrees(logits(backend, COPY, cut, text[:8]))
        assert backend.kv_remove(SOURCE, cut) is True
        assert expected.agrees(logits(backend, SOURCE, cut, text[:8]))
    finally:
        for sequence_id in range(MAX_SEQUENCES):
            backend.kv_remove(sequence_id, 0)


@named(*WINDOWED)
@pytest.mark.parametrize("cut", [CUT, LENGTH - 1, WINDOW // 2])
def test_kv_restore_of_a_window_is_cut_only_where_the_result_is_right(backend, cut):
    """llama.cpp's snapshot lacks what no window sees any more, also with `swa_full`: a cut into it would
    go on without the tokens before, silently."""
    beginning, way, other = tokens_of(backend, LENGTH, 8)
    whole = expectation(backend, beginning + other, 8)
    part = expectation(backend, beginning[:cut] + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    assert backend.kv_restore(COPY, backend.kv_save(SOURCE)) is True
    if backend.kv_copy(COPY, OTHER, cut):
        assert part.agrees(logits(backend, OTHER, cut, way))
    else:
        assert [backend.kv_length(id) for id in (COPY, OTHER)] == [LENGTH, 0]
    if backend.kv_remove(COPY, cut):
        assert part.agrees(logits(backend, COPY, cut, way))
    else:
        assert backend.kv_length(COPY) == LENGTH
        assert whole.agrees(logits(backend, COPY, LENGTH, other))


def read(backend: Backend, sequence_id: int, tokens: list[int]) -> None:
    """Prefills in as many steps as it takes."""
    for start in range(0, len(tokens), BATCH):
        outcome, _ = forward(backend, (sequence_id, start, tokens[start : start + BATCH], False))
        assert outcome is Outcome.DONE


def expectation_of_long(backend: Backend, beginning: list[int], way: list[int]) -> Expectation:
    """As `expectation`, with what a step holds as the first run; a token inside the window is changed."""
    ways = []
    for changed in (beginning, beginning, [*beginning[:-3], 3, *beginning[-2:]]):
        read(backend, SCRATCH, changed)
        ways.append(logits(backend, SCRATCH, len(changed), way))
        backend.kv_remove(SCRATCH, 0)
        if backend.kv_length(OTHER) == 0:
            read(backend, OTHER, way)  # the next way finds its room elsewhere
    backend.kv_remove(OTHER, 0)
    spread = float(np.abs(ways[0] - ways[1]).max())
    found = Expectation(ways[0], max(4 * spread, 1e-5 * float(np.ptp(ways[0]))))
    assert found.distance(ways[2]) > 2 * found.tolerance
    return found
