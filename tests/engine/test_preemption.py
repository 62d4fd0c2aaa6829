"""A sequence that loses its place and gets it back: nobody can tell, but for the time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from bear_grpc.backend.base import Outcome
from bear_grpc.params import OutputParams, SamplingParams
from bear_grpc.protocol import Delta, Finished, Prefilled, Started
from bear_grpc.types import LoadOptions
from tests.engine.harness import GREEDY, Harness, alone
from tests.engine.test_batching import ARRIVALS, SHAPES, expected, run

NO_ROOM = Outcome.NO_KV_ROOM
SAMPLED = SamplingParams(seed=9, temperature=1.5, top_k=0, repetition_window=-1)


def two_decoding(**second: object) -> Harness:
    """Sequence 1 and the younger 2, each with its first token."""
    harness = Harness()
    harness.submit(1, "hello")
    harness.submit(2, "abc", **second)
    harness.step()
    return harness


def preempt_in_decode(harness: Harness) -> None:
    """A step of two tokens without room is halved, then the youngest loses its place."""
    harness.backend.fail_next(NO_ROOM, NO_ROOM)
    harness.step()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_preemption_in_decode_leaves_the_output_unchanged(sampling):
    harness = two_decoding(sampling=sampling)
    preempt_in_decode(harness)
    harness.run()
    assert harness.result(2) == alone("abc", sampling=sampling)
    assert harness.result(1) == alone("hello")
    assert harness.is_clean()


def test_preemption_takes_the_youngest_and_the_other_goes_on_in_the_same_step():
    harness = two_decoding()
    before = len(harness.events(1))
    preempt_in_decode(harness)
    assert (harness.sequences[1].preemptions, harness.sequences[2].preemptions) == (0, 1)
    assert len(harness.events(1)) == before + 1


def test_preemption_is_told_in_timings_and_counted():
    harness = two_decoding()
    preempt_in_decode(harness)
    harness.run()
    assert harness.endings(2)[0].timings.preemptions == 1
    assert harness.endings(1)[0].timings.preemptions == 0
    assert harness.engine.stats().preemptions == 1


def test_preemption_tells_started_once_and_keeps_queue_and_first_token_times():
    harness = two_decoding()
    timings = harness.sequences[2].timings(harness.clock())
    preempt_in_decode(harness)
    harness.run()
    assert [event for event in harness.events(2) if isinstance(event, Started)] == [Started(2, 3, 0, 8)]
    after = harness.endings(2)[0].timings
    assert (after.queue_s, after.prefill_s) == (timings.queue_s, timings.prefill_s)


def test_preempted_sequence_is_the_next_to_get_a_slot():
    harness = Harness(max_sequences=2)
    harness.submit(1, "hello", max_tokens=20)
    harness.submit(2, "abc", max_tokens=20)
    harness.submit(3, "later", max_tokens=20)
    harness.step()
    preempt_in_decode(harness)
    harness.step()
    assert [event.id for event in harness.events(3)] == []
    assert harness.engine.stats().waiting == 1


def test_preempted_sequences_come_back_in_their_old_order():
    """Three lose their places one after the other in one step; the oldest of them is the first back."""
    harness = Harness(max_sequences=3)
    for id, prompt in enumerate(["one", "two", "six"], 1):
        harness.submit(id, prompt)
    harness.step()
    # 3 tokens, 1, then 1 twice more: the youngest two go.
    harness.backend.fail_next(*[NO_ROOM] * 3)
    harness.step()
    assert [harness.sequences[id].preemptions for id in (1, 2, 3)] == [0, 1, 1]
    harness.run()
    assert harness.sequences[2].order < harness.sequences[3].order
    for id, prompt in enumerate(["one", "two", "six"], 1):
        assert harness.result(id) == alone(prompt)


def test_preempted_sequence_cancelled_while_it_waits_ends_once_and_closes_its_sampler():
    harness = two_decoding(sampling=SAMPLED)
    preempt_in_decode(harness)
    harness.engine.cancel(2)
    harness.run()
    assert harness.result(2).error is None
    assert harness.is_clean()


def test_preempted_sequence_computes_its_own_tokens_again_too():
    harness = two_decoding()
    harness.step()
    preempt_in_decode(harness)
    harness.computed[2].clear()
    harness.run()
    assert harness.computed[2][: 3 + 2] == [*range(5)]
    assert harness.result(2).usage.completion_tokens == 8


def test_preemption_in_prefill_tells_progress_that_only_grows():
    harness = Harness()
    harness.submit(1, "hello", max_tokens=30)
    harness.step()
    harness.submit(2, "x" * 30, max_tokens=2, output=OutputParams(prefill_progress=True))
    harness.step()
    harness.step()
    # 8 tokens, 4, 2, 1.
    harness.backend.fail_next(*[NO_ROOM] * 4)
    harness.run()
    assert harness.sequences[2].preemptions == 1
    done = [event.done for event in harness.events(2) if isinstance(event, Prefilled)]
    assert done == sorted(set(done))
    assert done[-1] == 30


def test_preemption_of_a_stalled_sequence_gives_it_no_token_beyond_its_credit():
    """Its reader takes nothing: neither the tokens told nor the time to the stall's end may change."""
    harness = two_decoding(credit=2)
    harness.step()
    stalled_until = harness.engine.seconds_to_event() + harness.clock()
    harness.step()
    # Only sequence 1 decodes: one token.
    harness.backend.fail_next(NO_ROOM)
    harness.step()
    assert harness.sequences[2].preemptions == 1
    harness.run()
    told = sum(event.count for event in harness.events(2) if isinstance(event, Delta))
    assert told == 2
    assert harness.engine.seconds_to_event() + harness.clock() == pytest.approx(stalled_until)


def test_preempted_sequence_that_stalls_goes_on_with_new_credit():
    harness = two_decoding(credit=2)
    harness.step()
    harness.backend.fail_next(NO_ROOM)
    harness.step()
    harness.run()
    harness.engine.add_credit(2, 100)
    harness.run()
    assert harness.result(2) == alone("abc")


def test_preemption_of_a_leader_leaves_the_followers_output_unchanged():
    prompt = "p" * 60
    harness = Harness(batch_tokens=8)
    harness.submit(0, "first", max_tokens=40)
    harness.step()
    for id in (1, 2):
        harness.submit(id, prompt + "ab"[id - 1], max_tokens=3)
    harness.step()
    assert harness.sequences[2].leader is harness.sequences[1]
    # 8, 4, 2, 1 tokens: the follower goes; 1 token again: the leader goes too.
    harness.backend.fail_next(*[NO_ROOM] * 5)
    harness.run()
    assert [harness.sequences[id].preemptions for id in (0, 1, 2)] == [0, 1, 1]
    for id in (1, 2):
        assert harness.result(id) == alone(prompt + "ab"[id - 1], max_tokens=3)


def test_preempted_sequence_is_told_as_cached_what_was_at_its_start():
    """What it takes from the other when it comes back spares work, and changes nothing it was told."""
    prompt = "p" * 45
    harness = Harness(max_sequences=2, batch_tokens=20)
    harness.submit(1, prompt + "a", max_tokens=30)
    harness.step()
    harness.submit(2, prompt + "b", max_tokens=8)
    while not harness.sequences[2].num_completion:
        harness.step()
    assert harness.sequences[2].num_cached == 20
    preempt_in_decode(harness)
    assert harness.sequences[2].preemptions == 1
    harness.computed[2].clear()
    harness.run()
    assert harness.computed[2][0] == 45
    assert harness.result(2).cached == 20
    assert harness.result(2) == alone(prompt + "b", max_tokens=8)


def test_last_sequence_without_any_room_fails_and_the_next_goes_on():
    harness = Harness(max_sequences=1)
    harness.submit(1, "a", max_tokens=3)
    harness.submit(2, "b", max_tokens=3)
    harness.backend.fail_next(NO_ROOM)
    harness.run()
    assert harness.result(1).error.reason == "INTERNAL"
    assert harness.result(2) == alone("b", max_tokens=3)


def test_idle_prefixes_are_given_up_before_anything_running_suffers():
    harness = Harness()
    harness.submit(1, "gone and kept", max_tokens=1)
    harness.run()
    harness.submit(2, "abc", max_tokens=3)
    harness.backend.fail_next(NO_ROOM)
    harness.run()
    assert harness.result(2) == alone("abc", max_tokens=3)
    assert harness.engine.stats().preemptions == 0
    assert [len(batch) for batch in harness.backend.batches][2:4] == [3, 3]  # after it the same step again


@settings(max_examples=60)
@given(arrivals=ARRIVALS, shape=SHAPES)
def test_room_that_is_reserved_makes_preemptions_needless(arrivals, shape):
    """Without fragmentation, admission alone keeps the running ones within the pool."""
    harness = run(arrivals, shape)
    assert harness.engine.stats().preemptions == 0


@settings(max_examples=40)
@given(arrivals=ARRIVALS, shape=SHAPES)
def test_preemption_in_every_third_step_leaves_all_outputs_unchanged(arrivals, shape):
    def between(harness: Harness, step: int) -> None:
        if step % 3 == 2 and len(harness.sequences) > 1:
            harness.backend.fail_next(*[NO_ROOM] * 3)

    harness = run(arrivals, shape, between)
    for id, request in enumerate(arrivals):
        result = harness.result(id)
        if result.error is None:
            assert result == expected(request)
            ending = harness.endings(id)[0]
            assert isinstance(ending, Finished)
            assert ending.timings.preemptions == harness.sequences[id].preemptions
        else:
            assert "no room" in result.error.message
    assert harness.engine.stats().preemptions == sum(each.preemptions for each in harness.sequences.values())
    assert harness.is_clean()


def test_pool_too_small_for_all_at_once_lets_them_wait_and_all_finish():
    options = LoadOptions(kv_cache_tokens=64)
    harness = Harness(context_length=64, options=options)
    for id in range(5):
        harness.submit(id, f"{id}" * 20, max_tokens=20)
    harness.run()
    for id in range(5):
        assert harness.result(id) == alone(f"{id}" * 20, max_tokens=20)
    assert harness.engine.stats().preemptions == 0
