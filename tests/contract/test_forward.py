"""What the engine relies on in a forward pass: positions, chunks, cuts, aborts, refusals."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

from bear_grpc.backend.base import Backend, Batch, Logits, Outcome
from bear_grpc.testing import FakeBackend, Misuse
from tests.contract.conftest import BATCH, MAX_SEQUENCES, OPTIONS, TEXT, forward, logits, prompt
from tests.helpers.ggufs import write_tiny_llama

Row = tuple[int, int, list[int], bool]  # sequence id, start, tokens, logits wanted


def greedy(backend: Backend, tokens: list[int], chunk: int, count: int) -> list[int]:
    """Tokens drawn after a prompt that is read in chunks."""
    sequence = list(tokens)
    row: Logits | None = None
    for start in range(0, len(tokens), chunk):
        row = logits(backend, 0, start, tokens[start : start + chunk])
    for _ in range(count):
        assert row is not None
        sequence.append(int(row.argmax()))
        row = logits(backend, 0, len(sequence) - 1, sequence[-1:])
    return sequence[len(tokens) :]


def refused(backend: Backend, batch: Batch) -> bool:
    """Whether a batch is turned away: by an exception, or by an outcome that applies nothing."""
    try:
        return backend.forward(batch) in (Outcome.INVALID, Outcome.NO_KV_ROOM)
    except (IndexError, Misuse):
        return True


def test_options_effective_have_every_number_that_the_engine_needs(backend):
    options = backend.options
    assert (options.context_length, options.max_sequences, options.batch_tokens) == (256, 4, BATCH)
    assert options.kv_cache_tokens == 4 * 256
    assert backend.info.vocab_size == backend.vocabulary.size


def test_logits_have_one_finite_number_per_token(backend):
    row = logits(backend, 0, 0, prompt(backend, 8))
    assert (row.shape, row.dtype) == ((backend.vocabulary.size,), np.float32)
    assert np.isfinite(row).all()


@pytest.mark.parametrize("chunk", [2, 7, 32, 98])
def test_prefill_in_chunks_gives_bit_for_bit_what_one_chunk_gives(backend, chunk):
    tokens = prompt(backend, 100)
    whole = logits(backend, 0, 0, tokens)
    row = whole
    for start in range(0, len(tokens), chunk):
        row = logits(backend, 1, start, tokens[start : start + chunk])
    assert np.array_equal(whole, row)


def test_prefill_token_by_token_draws_the_same_unless_it_is_a_tie(backend):
    """Kernels for one row round otherwise than those for more. So the best token may change where its lead
    is of the size of that rounding, and nowhere else."""
    tokens = prompt(backend, 100)
    ties = 0
    for length in range(10, 101, 10):
        backend.kv_remove(0, 0)
        whole = logits(backend, 0, 0, tokens[:length])
        for start in range(backend.kv_length(1), length):
            row = logits(backend, 1, start, tokens[start : start + 1])
        rounding = float(np.abs(whole - row).max())
        assert rounding < 0.02 * np.ptp(whole)
        second, best = np.sort(whole)[-2:]
        if best - second < 4 * rounding:
            ties += 1
        else:
            assert whole.argmax() == row.argmax()
    assert ties < 5


@pytest.mark.parametrize("chunk", [5, 64])
def test_greedy_after_a_chunked_prefill_draws_the_same_tokens(backend, chunk):
    tokens = prompt(backend, 64)
    expected = greedy(backend, tokens, 64, 12)
    backend.kv_remove(0, 0)
    assert greedy(backend, tokens, chunk, 12) == expected


def test_every_sequence_id_gives_the_same(backend):
    tokens = prompt(backend, 10)
    rows = [logits(backend, sequence_id, 0, tokens) for sequence_id in range(MAX_SEQUENCES)]
    assert all(np.array_equal(rows[0], row) for row in rows)


def test_sequences_in_one_batch_do_not_see_each_other(backend):
    """Bits depend on the shape of the batch; mixed-up sequences would change the numbers by far more."""
    tokens, other = prompt(backend, 20), prompt(backend, 30, TEXT[::-1])
    alone = [logits(backend, 0, 0, tokens), logits(backend, 1, 0, other)]
    outcome, rows = forward(backend, (2, 0, tokens, True), (3, 0, other, True))
    assert outcome is Outcome.DONE
    for expected, row in zip(alone, rows, strict=True):
        assert np.allclose(expected, backend.logits(row), atol=0.02 * np.ptp(expected))
    assert not np.allclose(*alone, atol=0.02 * np.ptp(alone[0]))


def test_logits_depend_on_the_order_of_all_tokens(backend):
    tokens = prompt(backend, 10)
    swapped = [tokens[0], tokens[2], tokens[1], *tokens[3:]]
    assert tokens != swapped
    assert not np.array_equal(logits(backend, 0, 0, tokens), logits(backend, 1, 0, swapped))


def test_logits_of_many_rows_of_a_sequence_are_those_after_each_token(backend):
    """As many as a step may have, so that every position of a prompt can be told."""
    count = min(backend.max_outputs, 12)
    tokens = prompt(backend, 30 + count)
    forward(backend, (0, 0, tokens[:30], True))
    outcome, rows = forward(backend, *((0, at, [tokens[at]], True) for at in range(30, 30 + count)))
    assert outcome is Outcome.DONE
    several = [backend.logits(row).copy() for row in rows]
    for length, row in enumerate(several, start=31):
        backend.kv_remove(1, 0)
        expected = logits(backend, 1, 0, tokens[:length])
        assert np.allclose(row, expected, atol=0.02 * np.ptp(expected))
    assert not np.allclose(several[0], several[-1], atol=0.02 * np.ptp(several[0]))


def test_outputs_of_a_step_are_at_least_one_for_each_sequence_id(backend):
    ids = range(backend.kv.sequence_ids)
    assert backend.max_outputs >= len(ids)
    outcome, rows = forward(backend, *((id, 0, prompt(backend, 1), True) for id in ids))
    assert outcome is Outcome.DONE
    first = backend.logits(rows[0])
    for row in rows:
        assert np.allclose(backend.logits(row), first, atol=0.02 * np.ptp(first))


def test_logits_of_a_row_that_did_not_want_them_raise(backend):
    outcome, [row] = forward(backend, (0, 0, prompt(backend, 4), False))
    assert outcome is Outcome.DONE
    with pytest.raises(IndexError, match=str(row)):
        backend.logits(row)


def test_logits_of_a_row_outside_the_batch_raise(backend):
    forward(backend, (0, 0, prompt(backend, 4), True))
    with pytest.raises(IndexError, match="4"):
        backend.logits(4)


# ---- KV cache ---------------------------------------------------------------------------------------


def test_kv_length_of_an_unused_sequence_is_0(backend):
    assert [backend.kv_length(id) for id in range(MAX_SEQUENCES)] == [0] * MAX_SEQUENCES


def test_kv_length_grows_with_the_tokens_of_its_sequence_only(backend):
    forward(backend, (1, 0, prompt(backend, 10), True))
    forward(backend, (1, 10, [5], True), (2, 0, prompt(backend, 3), True))
    assert [backend.kv_length(id) for id in range(MAX_SEQUENCES)] == [0, 11, 3, 0]


def test_kv_remove_cuts_from_the_position_on(backend):
    forward(backend, (0, 0, prompt(backend, 10), True))
    assert backend.kv_remove(0, 6) is True
    assert backend.kv_length(0) == 6


def test_kv_remove_from_0_empties_the_sequence_and_leaves_the_others(backend):
    forward(backend, (0, 0, prompt(backend, 10), True), (1, 0, prompt(backend, 5), True))
    assert backend.kv_remove(0, 0) is True
    assert [backend.kv_length(0), backend.kv_length(1)] == [0, 5]


@pytest.mark.parametrize("start", [10, 15])
def test_kv_remove_at_or_past_the_end_changes_nothing(backend, start):
    forward(backend, (0, 0, prompt(backend, 10), True))
    assert backend.kv_remove(0, start) is True
    assert backend.kv_length(0) == 10


def test_kv_remove_then_the_same_tokens_again_give_the_same_logits(backend):
    tokens = prompt(backend, 40)
    whole = logits(backend, 0, 0, tokens)
    backend.kv_remove(0, 25)
    assert np.array_equal(logits(backend, 0, 25, tokens[25:]), whole)


def test_kv_remove_then_other_tokens_give_what_a_fresh_sequence_gives(backend):
    tokens = prompt(backend, 40)
    other = [*tokens[:20], *reversed(tokens[20:])]
    forward(backend, (0, 0, tokens, True))
    backend.kv_remove(0, 20)
    assert np.array_equal(logits(backend, 0, 20, other[20:]), logits(backend, 1, 0, other))


# ---- abort ------------------------------------------------------------------------------------------


def test_abort_set_before_a_forward_ends_it_aborted_without_logits(backend):
    tokens = prompt(backend, 100)
    backend.abort()
    outcome, [row] = forward(backend, (0, 0, tokens, True))
    assert outcome is Outcome.ABORTED
    assert backend.kv_length(0) < 100
    backend.clear_abort()
    assert logits(backend, 1, 0, tokens).shape == (backend.vocabulary.size,)
    assert row == 99


@pytest.mark.parametrize("attempt", range(3))
def test_abort_from_another_thread_in_a_long_prefill_resumes_bit_for_bit(backend, attempt):
    """How much is kept depends on the moment; what comes after going on does not."""
    tokens = prompt(backend, 200)
    whole = logits(backend, 0, 0, tokens)
    begin = threading.Event()

    def stop() -> None:
        begin.wait(10)
        backend.abort()

    aborter = threading.Thread(target=stop)
    aborter.start()
    begin.set()
    outcome, [row] = forward(backend, (1, 0, tokens, True))
    aborter.join(10)
    backend.clear_abort()
    if outcome is Outcome.DONE:  # it was faster than the thread
        assert np.array_equal(backend.logits(row), whole)
        return
    assert outcome is Outcome.ABORTED
    kept = min(backend.kv_length(1), 199)
    assert backend.kv_remove(1, kept) is True
    assert np.array_equal(logits(backend, 1, kept, tokens[kept:]), whole)


def test_abort_leaves_other_sequences_as_they_were(backend):
    tokens = prompt(backend, 60)
    whole = logits(backend, 0, 0, tokens)
    forward(backend, (1, 0, tokens[:30], True))
    backend.abort()
    forward(backend, (2, 0, tokens, True))
    backend.clear_abort()
    assert np.array_equal(logits(backend, 1, 30, tokens[30:]), whole)


# ---- refusals ---------------------------------------------------------------------------------------


def bad_batches(size: int, sequence_ids: int) -> dict[str, list[Row]]:
    return {
        "token below 0": [(0, 0, [-1], True)],
        "token past the vocabulary": [(0, 0, [size], True)],
        "sequence id below 0": [(-1, 0, [5], True)],
        "sequence id past the last": [(sequence_ids, 0, [5], True)],
        "gap in the positions": [(0, 0, [5, 6], True), (0, 3, [7], False)],
    }


@pytest.mark.parametrize("what", bad_batches(0, 0))
def test_batch_that_is_wrong_is_refused_and_changes_nothing(backend, what):
    batch = Batch(BATCH)
    for row in bad_batches(backend.vocabulary.size, backend.kv.sequence_ids)[what]:
        batch.extend(*row)
    assert refused(backend, batch)
    assert [backend.kv_length(id) for id in range(MAX_SEQUENCES)] == [0] * MAX_SEQUENCES


def test_batch_that_leaves_a_gap_after_the_kv_cache_is_refused(backend):
    forward(backend, (0, 0, prompt(backend, 4), True))
    batch = Batch(BATCH)
    batch.extend(0, 6, [5], True)
    assert refused(backend, batch)
    assert backend.kv_length(0) == 4


def test_batch_past_the_context_is_refused(backend):
    """Also where the room of all sequences would take it."""
    tokens = list(itertools.islice(itertools.cycle(prompt(backend, 100)), 256))
    forward(backend, (0, 0, tokens, True))
    batch = Batch(BATCH)
    batch.extend(0, 256, [5], True)
    assert refused(backend, batch)
    assert backend.kv_length(0) == 256


def test_batch_empty_is_refused(backend):
    assert refused(backend, Batch(BATCH))


def test_batch_bigger_than_the_backend_takes_raises(backend):
    batch = Batch(BATCH + 1)
    batch.extend(0, 0, [5] * (BATCH + 1), True)
    with pytest.raises((IndexError, Misuse)):
        backend.forward(batch)


OUT_OF_RANGE = """
import sys
from pathlib import Path
from bear_grpc.backend import llama, native
from bear_grpc.types import LoadOptions

native.start()
options = LoadOptions(context_length=256, max_sequences=2, threads=1)
backend = llama.LlamaBackend(Path(sys.argv[1]), options, cores=1, report=lambda stage, fraction: None)
calls = [
    backend.kv_length,
    lambda id: backend.kv_remove(id, 0),
    lambda id: backend.kv_copy(id, 0, 0),
    lambda id: backend.kv_copy(0, id, 0),
    backend.kv_save,
    lambda id: backend.kv_restore(id, b""),
    lambda id: backend.kv_restore(id, b"anything"),
]
for call in calls:
    for id in (-1, backend.kv.sequence_ids):
        try:
            call(id)
        except IndexError:
            continue
        sys.exit(3)
"""


@pytest.mark.model
def test_kv_of_llama_with_a_sequence_id_out_of_range_raises(tmp_path):
    """In a process of its own: llama.cpp would end it."""
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    done = subprocess.run([sys.executable, "-c", OUT_OF_RANGE, str(path)], capture_output=True, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda backend, id: backend.kv_length(id),
        lambda backend, id: backend.kv_remove(id, 0),
        lambda backend, id: backend.kv_copy(id, 0, 0),
        lambda backend, id: backend.kv_copy(0, id, 0),
        lambda backend, id: backend.kv_save(id),
        lambda backend, id: backend.kv_restore(id, b""),
    ],
)
def test_kv_of_the_fake_with_a_sequence_id_out_of_range_raises(call):
    backend = FakeBackend(OPTIONS)
    for sequence_id in (-1, backend.kv.sequence_ids):
        with pytest.raises(IndexError):
            call(backend, sequence_id)
