"""The fakes: deterministic, and strict about what llama.cpp would not forgive."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from bear_grpc.backend.base import Batch, KvTraits, Outcome
from bear_grpc.params import SamplingParams
from bear_grpc.testing import FakeBackend, FakeClock, FakeSampler, FakeVocabulary, Misuse
from bear_grpc.types import LoadOptions

OPTIONS = LoadOptions(context_length=8, max_sequences=2, batch_tokens=6)
SPLIT = LoadOptions(kv_unified=False).over(OPTIONS)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(OPTIONS)


def batch_of(*runs: tuple[int, int, list[int], bool], capacity: int = 6) -> Batch:
    batch = Batch(capacity)
    for run in runs:
        batch.extend(*run)
    return batch


def in_thread(call) -> list[BaseException]:
    """What a call on another thread raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    return raised


@pytest.mark.parametrize(
    ("runs", "problem"),
    [
        ([], "0 tokens"),
        ([(0, 0, [1], True), (0, 2, [1], True)], "position 2"),
        ([(0, 0, [1], True), (0, 0, [1], True)], "position 0"),
        ([(0, 1, [1], True)], "position 1"),
        ([(32, 0, [1], True)], "sequence id 32 of 32"),
        ([(-1, 0, [1], True)], "sequence id -1"),
        ([(0, 0, [9999], True)], "token 9999"),
        ([(0, 0, [-1], True)], "token -1"),
    ],
)
def test_fake_forward_of_a_wrong_batch_is_misuse_and_changes_nothing(backend, runs, problem):
    with pytest.raises(Misuse, match=problem):
        backend.forward(batch_of(*runs))
    assert [backend.kv_length(id) for id in range(2)] == [0, 0]


def test_fake_forward_with_more_outputs_than_allowed_is_misuse_and_changes_nothing():
    backend = FakeBackend(OPTIONS, max_outputs=2)
    runs = [(0, 0, [1], True), (0, 1, [1], True), (0, 2, [1], True)]
    with pytest.raises(Misuse, match="3 rows with logits"):
        backend.forward(batch_of(*runs))
    assert backend.kv_length(0) == 0
    assert backend.forward(batch_of(*runs[:2])) is Outcome.DONE
    assert not np.array_equal(backend.logits(0), backend.logits(1))


def test_fake_forward_over_the_batch_tokens_is_misuse(backend):
    with pytest.raises(Misuse, match="7 tokens"):
        backend.forward(batch_of((0, 0, [1] * 7, True), capacity=7))


def test_fake_forward_past_the_context_is_misuse(backend):
    backend.forward(batch_of((0, 0, [1] * 6, True)))
    backend.forward(batch_of((0, 6, [1] * 2, True)))
    with pytest.raises(Misuse, match="position 8"):
        backend.forward(batch_of((0, 8, [1], True)))


def test_fake_forward_without_kv_room_applies_nothing():
    options = LoadOptions(context_length=8, max_sequences=2, batch_tokens=6, kv_cache_tokens=8)
    backend = FakeBackend(options)
    backend.forward(batch_of((0, 0, [1] * 6, True)))
    assert backend.forward(batch_of((1, 0, [1] * 3, True))) is Outcome.NO_KV_ROOM
    assert backend.kv_length(1) == 0
    assert backend.forward(batch_of((1, 0, [1] * 2, True))) is Outcome.DONE


# ---- KV cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changes", "traits"),
    [
        (OPTIONS, {}, KvTraits(32, 16, unified=True, can_cut=True)),
        (LoadOptions(max_sequences=9).over(OPTIONS), {}, KvTraits(36, 72, unified=True, can_cut=True)),
        (OPTIONS, {"sequence_ids": 3}, KvTraits(3, 16, unified=True, can_cut=True)),
        (SPLIT, {}, KvTraits(2, 16, unified=False, can_cut=True)),
        (OPTIONS, {"can_cut": False}, KvTraits(2, 16, unified=False, can_cut=False)),
    ],
)
def test_fake_kv_traits_are_those_of_the_options(options, changes, traits):
    backend = FakeBackend(options, **changes)
    assert backend.kv == traits
    assert (backend.max_outputs, backend.options.kv_unified) == (traits.sequence_ids + 32, traits.unified)


def test_fake_with_more_sequence_ids_than_parts_of_the_room_is_refused():
    with pytest.raises(ValueError, match="max_sequences"):
        FakeBackend(SPLIT, sequence_ids=3)


def test_fake_kv_cell_that_is_shared_takes_room_until_its_last_sequence_is_gone(backend):
    backend.forward(batch_of((0, 0, [1, 2, 3, 4], True)))
    assert backend.kv_copy(0, 1, 3) is True
    assert backend.kv_copy(1, 2, 2) is True
    assert backend.kv_used() == 4
    backend.forward(batch_of((1, 3, [5], True)))
    assert [backend.kv_tokens(id) for id in range(3)] == [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2]]
    assert backend.kv_used() == 5
    backend.kv_remove(0, 0)
    assert backend.kv_used() == 4
    backend.kv_remove(1, 1)
    assert backend.kv_used() == 2
    backend.kv_remove(2, 0)
    assert backend.kv_used() == 1


def test_fake_kv_copy_between_parts_of_the_room_takes_its_own():
    backend = FakeBackend(SPLIT)
    backend.forward(batch_of((0, 0, [1, 2, 3, 4], True)))
    assert backend.kv_copy(0, 1, 3) is True
    assert backend.kv_used() == 7


def test_fake_kv_room_of_a_part_that_is_full_leaves_that_of_the_others():
    backend = FakeBackend(LoadOptions(kv_cache_tokens=8).over(SPLIT))
    backend.forward(batch_of((0, 0, [1, 2, 3], True)))
    assert backend.forward(batch_of((0, 3, [4, 5], True), (1, 0, [1], True))) is Outcome.NO_KV_ROOM
    assert [backend.kv_length(id) for id in range(2)] == [3, 0]
    assert backend.forward(batch_of((0, 3, [4], True), (1, 0, [1, 2, 3, 4], True))) is Outcome.DONE


@pytest.mark.parametrize("length", [0, -1, 4])
def test_fake_kv_copy_of_what_is_not_there_is_misuse(backend, length):
    backend.forward(batch_of((0, 0, [1, 2, 3], True)))
    with pytest.raises(Misuse, match=f"copy of {length} tokens"):
        backend.kv_copy(0, 1, length)


@pytest.mark.parametrize(
    "call", [lambda backend: backend.kv_copy(0, 1, 2), lambda backend: backend.kv_restore(1, b"")]
)
def test_fake_kv_copy_or_restore_into_a_sequence_in_use_is_misuse(backend, call):
    backend.forward(batch_of((0, 0, [1, 2], True), (1, 0, [3], True)))
    with pytest.raises(Misuse, match="sequence 1 is in use"):
        call(backend)
    assert backend.kv_tokens(1) == [3]


def test_fake_kv_restore_of_other_data_is_misuse(backend):
    with pytest.raises(Misuse, match="kv_save"):
        backend.kv_restore(0, b"something")


def test_fake_kv_restore_without_room_applies_nothing():
    backend = FakeBackend(LoadOptions(kv_cache_tokens=8).over(OPTIONS))
    backend.forward(batch_of((0, 0, [1, 2, 3, 4, 5], True)))
    saved = backend.kv_save(0)
    assert backend.kv_restore(1, saved) is False
    assert (backend.kv_length(1), backend.kv_used()) == (0, 5)
    backend.kv_remove(0, 3)
    assert backend.kv_restore(1, saved) is True
    assert backend.kv_tokens(1) == [1, 2, 3, 4, 5]


# ---- threads and time -------------------------------------------------------------------------------


def test_fake_forward_takes_the_seconds_of_its_rows():
    clock = FakeClock(0.0)
    backend = FakeBackend(OPTIONS, clock=clock, seconds_per_step=lambda rows: 1.0 + rows / 4)
    backend.forward(batch_of((0, 0, [1, 2, 3, 4], True)))
    assert clock() == 2.0
    backend.forward(batch_of((0, 4, [5], True), (1, 0, [1], True)))
    assert clock() == 3.5


@pytest.mark.parametrize("outcome", [Outcome.INVALID, Outcome.NO_KV_ROOM])
def test_fake_forward_that_is_refused_takes_no_time(outcome):
    clock = FakeClock(0.0)
    backend = FakeBackend(OPTIONS, clock=clock, seconds_per_step=lambda rows: 1.0)
    backend.fail_next(outcome)
    assert backend.forward(batch_of((0, 0, [1], True))) is outcome
    assert clock() == 0.0


def test_fake_with_seconds_but_no_clock_is_refused():
    with pytest.raises(ValueError, match="together"):
        FakeBackend(OPTIONS, seconds_per_step=lambda rows: 1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda backend: backend.forward(batch_of((0, 0, [1], True))),
        lambda backend: backend.logits(0),
        lambda backend: backend.kv_length(0),
        lambda backend: backend.kv_remove(0, 0),
        lambda backend: backend.kv_copy(0, 1, 1),
        lambda backend: backend.kv_save(0),
        lambda backend: backend.kv_restore(0, b""),
        lambda backend: backend.make_sampler(SamplingParams()),
        lambda backend: backend.set_threads(1),
        lambda backend: backend.close(),
    ],
)
def test_fake_call_on_another_thread_or_after_close_is_misuse(backend, call):
    assert [type(error) for error in in_thread(lambda: call(backend))] == [Misuse]
    backend.close()
    with pytest.raises(Misuse, match="close"):
        call(backend)


def test_fake_abort_and_its_like_are_for_any_thread(backend):
    def calls() -> None:
        backend.abort()
        backend.clear_abort()
        backend.hold()
        backend.release()

    assert in_thread(calls) == []


def test_fake_logits_are_a_function_of_the_whole_sequence(backend):
    def after(sequence_id: int, tokens: list[int]) -> bytes:
        backend.kv_remove(sequence_id, 0)
        backend.forward(batch_of((sequence_id, 0, tokens, True)))
        return backend.logits(len(tokens) - 1).tobytes()

    base = after(0, [1, 2, 3])
    assert after(1, [1, 2, 3]) == base
    assert (
        len({base, after(0, [2, 1, 3]), after(0, [1, 1, 3]), after(0, [2, 3]), after(0, [1, 2, 3, 3])}) == 5
    )


def test_fake_logits_of_another_seed_are_others():
    rows = []
    for seed in range(2):
        backend = FakeBackend(OPTIONS, seed=seed)
        backend.forward(batch_of((0, 0, [1], True)))
        rows.append(backend.logits(0))
    assert not np.array_equal(*rows)


def test_fake_logits_kept_over_the_next_forward_are_poisoned(backend):
    backend.forward(batch_of((0, 0, [1], True)))
    kept = backend.logits(0)
    assert np.isfinite(kept).all()
    backend.forward(batch_of((0, 1, [1], False)))
    assert np.isnan(kept).all()
    with pytest.raises(IndexError, match="row 0"):
        backend.logits(0)


def test_fake_failure_as_scripted_keeps_rows_and_gives_no_logits(backend):
    backend.fail_next(Outcome.FAILED, kept=2)
    assert backend.forward(batch_of((0, 0, [1, 2, 3], True))) is Outcome.FAILED
    assert backend.kv_tokens(0) == [1, 2]
    with pytest.raises(IndexError):
        backend.logits(2)
    assert backend.forward(batch_of((0, 2, [3], True))) is Outcome.DONE


@pytest.mark.parametrize("outcome", [Outcome.INVALID, Outcome.NO_KV_ROOM])
def test_fake_refusal_as_scripted_keeps_nothing(backend, outcome):
    backend.fail_next(outcome, kept=2)
    assert backend.forward(batch_of((0, 0, [1, 2, 3], True))) is outcome
    assert backend.kv_length(0) == 0


@pytest.mark.parametrize(("end", "outcome"), [("release", Outcome.DONE), ("abort", Outcome.ABORTED)])
def test_fake_forward_held_goes_on_at_release_or_abort(end, outcome):
    outcomes: list[Outcome] = []
    made: list[FakeBackend] = []
    ready = threading.Event()

    def own() -> None:
        backend = FakeBackend(OPTIONS)
        backend.hold()
        made.append(backend)
        ready.set()
        outcomes.append(backend.forward(batch_of((0, 0, [1], True))))

    owner = threading.Thread(target=own)
    owner.start()
    assert ready.wait(10)
    assert made[0].entered.wait(10)
    assert outcomes == []
    getattr(made[0], end)()
    owner.join(10)
    assert outcomes == [outcome]


def test_fake_that_cannot_cut_only_clears_whole():
    backend = FakeBackend(OPTIONS, can_cut=False)
    backend.forward(batch_of((0, 0, [1, 2, 3], True)))
    assert backend.kv_remove(0, 1) is False
    assert backend.kv_length(0) == 3
    assert backend.kv_copy(0, 1, 2) is False
    assert backend.kv_copy(0, 1, 3) is True
    assert backend.kv_remove(0, 3) is True
    assert backend.kv_remove(0, 0) is True
    assert backend.kv_length(0) == 0


def test_fake_removal_below_0_is_misuse(backend):
    with pytest.raises(Misuse, match="-1"):
        backend.kv_remove(0, -1)


@pytest.mark.parametrize("call", ["close", "accept", "candidates"])
def test_fake_sampler_used_after_close_raises(call):
    sampler = FakeSampler(SamplingParams())
    sampler.close()
    arguments = {"close": (), "accept": (1,), "candidates": (np.zeros(3, np.float32),)}[call]
    with pytest.raises(RuntimeError, match="closed"):
        getattr(sampler, call)(*arguments)


def test_fake_vocabulary_longer_control_texts_win():
    vocabulary = FakeVocabulary(controls=("<a", "<ab>"))
    assert vocabulary.tokenize("<ab><a", add_special=False, parse_special=True) == [
        vocabulary.control("<ab>"),
        vocabulary.control("<a"),
    ]


def test_fake_clock_moves_only_when_told():
    clock = FakeClock(5.0)
    assert [clock(), clock()] == [5.0, 5.0]
    clock.advance(1.5)
    assert clock() == 6.5
