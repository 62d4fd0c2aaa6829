"""What the engine relies on where the KV cache is full: nothing is applied, and shared room counts once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from bear_grpc.backend.base import Backend, Batch, Outcome
from bear_grpc.testing import Misuse
from tests.contract.conftest import (
    BATCH,
    COPY,
    LENGTH,
    OPTIONS,
    OTHER,
    SOURCE,
    UNIFIED,
    Open,
    expectation,
    forward,
    logits,
    named,
    tokens_of,
    with_leftovers,
)  # fmt: skip


@pytest.fixture
def backend(name: str, open_backend: Open) -> Iterator[Backend]:
    """The backend `name` with an empty KV cache."""
    yield from with_leftovers(open_backend(name))


def fill(backend: Backend, sequence_id: int, start: int, count: int) -> Outcome:
    """A run of one token."""
    return forward(backend, (sequence_id, start, [5] * count, False))[0]


@UNIFIED
def test_kv_room_that_is_full_gives_no_room_and_applies_nothing(backend):
    beginning, way, _ = tokens_of(backend, LENGTH, 8)
    expected = expectation(backend, beginning + way, 8)
    forward(backend, (SOURCE, 0, beginning, False))
    left = backend.kv.pool_tokens - LENGTH
    for sequence_id in itertools.count(4):
        count = min(left, BATCH)
        assert fill(backend, sequence_id, 0, count) is Outcome.DONE
        left -= count
        if not left:
            break
    before = [backend.kv_length(id) for id in range(backend.kv.sequence_ids)]
    outcome, _ = forward(backend, (SOURCE, LENGTH, way, True), (COPY, 0, way, True))
    assert outcome is Outcome.NO_KV_ROOM
    assert [backend.kv_length(id) for id in range(backend.kv.sequence_ids)] == before
    assert backend.kv_remove(4, 0) is True
    assert expected.agrees(logits(backend, SOURCE, LENGTH, way))


@UNIFIED
def test_kv_copies_share_their_room(backend):
    ids = range(backend.kv.sequence_ids)
    length = 100
    assert length * len(ids) > backend.kv.pool_tokens
    assert fill(backend, 0, 0, length) is Outcome.DONE
    for sequence_id in ids[1:]:
        assert backend.kv_copy(0, sequence_id, length) is True
    assert forward(backend, *((id, length, [7], False) for id in ids))[0] is Outcome.DONE
    left = backend.kv.pool_tokens - length - len(ids)
    for sequence_id in ids:
        count = min(left, OPTIONS.context_length - length - 1)
        if count:
            assert fill(backend, sequence_id, length + 1, count) is Outcome.DONE
        left -= count
    assert left == 0
    assert fill(backend, ids[-1], length + 1, 1) is Outcome.NO_KV_ROOM


@UNIFIED
def test_kv_restore_without_room_is_false_and_leaves_it_empty(backend):
    fill(backend, 0, 0, BATCH)
    saved = backend.kv_save(0)
    for sequence_id in range(1, backend.kv.pool_tokens // BATCH):
        assert backend.kv_restore(sequence_id, saved) is True
    last = backend.kv.sequence_ids - 1
    assert backend.kv_restore(last, saved) is False
    assert backend.kv_length(last) == 0
    assert backend.kv_remove(1, 0) is True
    assert backend.kv_restore(last, saved) is True
    assert backend.kv_length(last) == BATCH


@named("fake-split", "tiny-split", "gemma2-split")
def test_kv_room_of_one_sequence_that_is_full_leaves_that_of_the_others(backend):
    """A batch past the context is refused, however much room others have."""
    context = OPTIONS.context_length
    for start in range(0, context, BATCH):
        assert fill(backend, SOURCE, start, BATCH) is Outcome.DONE
    batch = Batch(BATCH)
    batch.extend(SOURCE, context, [5], True)
    with contextlib.suppress(Misuse):
        assert backend.forward(batch) in (Outcome.INVALID, Outcome.NO_KV_ROOM)
    assert backend.kv_length(SOURCE) == context
    assert backend.kv_copy(SOURCE, COPY, context) is True
    assert fill(backend, OTHER, 0, BATCH) is Outcome.DONE
