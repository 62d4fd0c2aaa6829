"""What is told besides text: log probabilities, the prompt, progress."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.backend.base import Outcome
from bear_grpc.engine import delivery
from bear_grpc.engine.echo import Echo
from bear_grpc.framing import MAX_FRAME_BYTES, encode
from bear_grpc.params import OutputParams, SamplingParams, StopParams
from bear_grpc.protocol import Delta, Finished, Prefilled, Started, Token
from bear_grpc.types import LoadOptions
from tests.engine.harness import GREEDY, FakeVocabulary, Harness

VOCABULARY = FakeVocabulary()
PROMPT = [VOCABULARY.bos, *"héllo wörld".encode()]
ECHO = OutputParams(echo=True)
ECHO_TOKENS = OutputParams(echo=True, tokens=True)
ECHO_LOGPROBS = OutputParams(echo=True, logprobs=True, top_logprobs=3)


def row_of(harness: Harness, tokens: list[int]) -> np.ndarray:
    """Log probabilities after these tokens, by the definition, in float64."""
    logits = harness.backend._logits_after(tokens).astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def deltas(harness: Harness, id: int = 1) -> list[Delta]:
    return [event for event in harness.events(id) if isinstance(event, Delta)]


def echo_deltas(harness: Harness, id: int = 1) -> list[Delta]:
    """Those before the first drawn token; text that was held back comes after the last one."""
    return list(itertools.takewhile(lambda delta: delta.count == 0, deltas(harness, id)))


def echoed(harness: Harness, id: int = 1) -> list[Token]:
    return [token for delta in echo_deltas(harness, id) for token in delta.tokens]


def drawn(harness: Harness, id: int = 1) -> list[Token]:
    return [token for delta in deltas(harness, id) if delta.count for token in delta.tokens]


def echo_text(harness: Harness, id: int = 1) -> str:
    return "".join(delta.text for delta in echo_deltas(harness, id))


def submit_echo(
    harness: Harness, output: OutputParams, tokens: list[int] = PROMPT, **changes: object
) -> None:
    harness.submit(1, tokens, output=output, echo=Echo(), **{"max_tokens": 3, **changes})


# ---- log probabilities of what is drawn -------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(seed=3, temperature=2, logit_bias=((65, 3.0),), presence_penalty=1)],
    ids=["greedy", "filtered"],
)
def test_logprobs_are_those_of_the_raw_row(sampling):
    harness = Harness()
    harness.submit(1, PROMPT, sampling=sampling, max_tokens=5, output=OutputParams(top_logprobs=4))
    harness.run()
    tokens = list(PROMPT)
    for token in drawn(harness):
        row = row_of(harness, tokens)
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        best = np.argsort(-row, kind="stable")[:4]
        assert [top.id for top in token.top] == best.tolist()
        assert [top.logprob for top in token.top] == pytest.approx(row[best].tolist(), abs=1e-5)
        assert [top.piece for top in token.top] == [VOCABULARY.piece(id, special=True) for id in best]
        tokens.append(token.id)
    assert len(tokens) == len(PROMPT) + 5


def test_logprobs_without_top_have_none():
    harness = Harness()
    harness.submit(1, "hello", max_tokens=2, output=OutputParams(logprobs=True))
    harness.run()
    assert [(token.logprob is None, token.top) for token in drawn(harness)] == [(False, [])] * 2


def test_tokens_without_logprobs_have_their_bytes_only():
    harness = Harness()
    harness.submit(1, "hello", max_tokens=2, output=OutputParams(tokens=True))
    harness.run()
    for token in drawn(harness):
        assert token == Token(token.id, VOCABULARY.piece(token.id, special=True))


def test_logprobs_are_told_of_the_token_that_ends_the_text():
    harness = Harness()
    sampling = SamplingParams(temperature=0, repetition_penalty=1, logit_bias=((VOCABULARY.eos, 1000.0),))
    harness.submit(1, "hello", sampling=sampling, stop=StopParams(), output=OutputParams(logprobs=True))
    harness.run()
    [token] = drawn(harness)
    assert token.id == VOCABULARY.eos
    assert token.logprob == pytest.approx(row_of(harness, list(b"hello"))[VOCABULARY.eos], abs=1e-5)


# ---- the prompt -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [ECHO, ECHO_LOGPROBS, ECHO_TOKENS])
def test_echo_tells_the_prompts_text_before_the_first_drawn_token(output):
    harness = Harness()
    submit_echo(harness, output)
    harness.run()
    assert echo_text(harness) == "héllo wörld"  # control tokens are not text
    assert sum(delta.count for delta in deltas(harness)) == 3
    assert isinstance(harness.events(1)[0], Started)
    assert harness.result(1).usage.completion_tokens == 3


def test_echo_has_tokens_only_if_asked_for():
    harness = Harness()
    submit_echo(harness, ECHO)
    harness.run()
    assert echoed(harness) == []
    harness = Harness()
    submit_echo(harness, ECHO_TOKENS)
    harness.run()
    assert echoed(harness) == [Token(token, VOCABULARY.piece(token, special=True)) for token in PROMPT]


def assert_prompt_logprobs(harness: Harness, tokens: list[int] = PROMPT, id: int = 1) -> None:
    """The first has none; every other one is exact, and each is told once."""
    told = echoed(harness, id)
    assert [token.id for token in told] == tokens
    assert [token.piece for token in told] == [VOCABULARY.piece(token, special=True) for token in tokens]
    if told:
        assert (told[0].logprob, told[0].top) == (None, [])
    for place, token in enumerate(told[1:], 1):
        row = row_of(harness, tokens[:place])
        assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
        assert [top.id for top in token.top] == np.argsort(-row, kind="stable")[:3].tolist()


@pytest.mark.parametrize("batch_tokens", [1, 2, 5, 13, 14, 64])
def test_echo_with_logprobs_is_exact_across_all_chunk_borders(batch_tokens):
    harness = Harness(max_sequences=1, batch_tokens=batch_tokens)
    submit_echo(harness, ECHO_LOGPROBS)
    harness.run()
    assert_prompt_logprobs(harness)
    assert len(drawn(harness)) == 3


@pytest.mark.parametrize("max_outputs", [3, 4, 7])
def test_echo_with_logprobs_keeps_to_the_rows_that_a_step_may_have(max_outputs):
    """The fake backend takes no more; other sequences have their rows beside it."""
    harness = Harness(max_sequences=3, batch_tokens=32, max_outputs=max_outputs)
    harness.submit(2, "other", max_tokens=6)
    submit_echo(harness, ECHO_LOGPROBS)
    harness.submit(3, "third one", max_tokens=6, output=ECHO_LOGPROBS, echo=Echo())
    harness.run()
    assert_prompt_logprobs(harness)
    assert_prompt_logprobs(harness, list(b"third one"), 3)


def test_echo_with_logprobs_of_a_prompt_of_one_token_has_that_without():
    harness = Harness()
    submit_echo(harness, ECHO_LOGPROBS, [65])
    harness.run()
    assert_prompt_logprobs(harness, [65])
    assert echo_text(harness) == "A"


def test_echo_with_logprobs_and_max_tokens_0_scores_a_text():
    harness = Harness()
    submit_echo(harness, ECHO_LOGPROBS, max_tokens=0)
    harness.run()
    assert_prompt_logprobs(harness)
    assert drawn(harness) == []
    assert isinstance(harness.endings(1)[0], Finished)


def test_echo_with_logprobs_takes_nothing_from_the_cache():
    harness = Harness(batch_tokens=64)
    tokens = PROMPT * 3
    harness.submit(2, tokens, max_tokens=1)
    harness.run()
    submit_echo(harness, ECHO_LOGPROBS, tokens)
    harness.run()
    assert harness.result(1).cached == 0
    assert_prompt_logprobs(harness, tokens)


def test_echo_without_logprobs_of_a_cached_prompt_is_told_in_full():
    harness = Harness(batch_tokens=64)
    harness.submit(2, PROMPT, max_tokens=1)
    harness.run()
    submit_echo(harness, ECHO)
    harness.run()
    assert harness.result(1).cached == len(PROMPT) - 1
    assert echo_text(harness) == "héllo wörld"


def test_echo_of_a_long_prompt_comes_in_pieces(monkeypatch):
    monkeypatch.setattr(delivery, "ECHO_TOKENS", 5)
    harness = Harness(batch_tokens=64)
    submit_echo(harness, ECHO_TOKENS)
    harness.run()
    sizes = [len(delta.tokens) for delta in echo_deltas(harness)]
    assert sizes == [5, 5, 4]
    assert echo_text(harness) == "héllo wörld"


def test_echo_of_many_answers_to_a_long_prompt_fits_into_frames():
    """All followers start in one step. A frame over the limit would end the worker."""
    n = 16
    harness = Harness(max_sequences=n, batch_tokens=512, context_length=32768)
    for id in range(n):
        harness.submit(id, [7] * 20_000, output=ECHO_TOKENS, echo=Echo(), max_tokens=1)
    harness.run()
    assert max(len(encode(step)) for step in harness.steps) < MAX_FRAME_BYTES // 2
    assert all(len(echoed(harness, id)) == 20_000 for id in range(n))


def test_echo_of_half_a_character_at_the_end_of_the_prompt_is_a_replacement():
    harness = Harness()
    submit_echo(harness, ECHO, [*b"ab", 0xE2, 0x82])
    harness.run()
    assert echo_text(harness) == "ab\ufffd"


def test_echo_does_not_stop_at_stop_sequences():
    harness = Harness()
    stop = StopParams(sequences=("llo",), ignore_eos=True)
    submit_echo(harness, ECHO, list(b"hello"), stop=stop)
    harness.run()
    assert echo_text(harness) == "hello"


def test_echo_with_logprobs_of_a_preempted_prompt_tells_nothing_twice():
    tokens = list(range(40, 70))
    harness = Harness(max_sequences=2, batch_tokens=8)
    harness.submit(2, "beside", max_tokens=60)
    harness.step()
    submit_echo(harness, ECHO_LOGPROBS, tokens)
    harness.step()
    harness.step()
    assert len(echoed(harness)) == 15
    harness.backend.fail_next(*[Outcome.NO_KV_ROOM] * 4)
    harness.step()
    assert harness.sequences[1].preemptions == 1
    harness.run()
    assert_prompt_logprobs(harness, tokens)


@settings(max_examples=40)
@given(
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=24),
    batch_tokens=st.integers(2, 12),
    accidents=st.lists(
        st.tuples(st.integers(1, 12), st.sampled_from(["abort", "preempt"]), st.integers(0, 6)), max_size=3
    ),
    kind=st.sampled_from([(True, True), (False, True), (False, False)]),
)
def test_echo_with_logprobs_tells_nothing_twice_whatever_happens(prompt, batch_tokens, accidents, kind):
    unified, can_cut = kind
    harness = Harness(
        max_sequences=2, batch_tokens=batch_tokens, options=LoadOptions(kv_unified=unified), can_cut=can_cut
    )
    harness.submit(2, "beside", max_tokens=60)
    harness.step()
    submit_echo(harness, ECHO_LOGPROBS, prompt, max_tokens=6)
    for number in range(200):
        for at, what, kept in accidents:
            if at == number and len(harness.sequences) == 2:
                outcomes = [Outcome.ABORTED] if what == "abort" else [Outcome.NO_KV_ROOM] * 4
                harness.backend.fail_next(*outcomes, kept=kept)
        if not harness.step():
            break
    if harness.result(1).error is None:
        assert_prompt_logprobs(harness, prompt)
        assert len(drawn(harness)) == 6
        assert echo_text(harness) == bytes(prompt).decode(errors="replace")


# ---- progress ---------------------------------------------------------------------------------------


def progress(harness: Harness, id: int = 1) -> list[tuple[int, int]]:
    return [(event.done, event.total) for event in harness.events(id) if isinstance(event, Prefilled)]


def test_progress_is_told_with_every_chunk_up_to_the_whole():
    harness = Harness(batch_tokens=8)
    harness.submit(1, "x" * 20, output=OutputParams(prefill_progress=True), max_tokens=4)
    harness.run()
    assert progress(harness) == [(8, 20), (16, 20), (20, 20)]
    kinds = [type(event) for event in harness.events(1)]
    assert kinds == [Started, *[Prefilled] * 3, *[Delta] * 4, Finished]


def test_progress_is_not_told_unless_asked_for():
    harness = Harness(batch_tokens=8)
    harness.submit(1, "x" * 20)
    harness.run()
    assert progress(harness) == []


def test_progress_counts_what_came_from_the_cache():
    harness = Harness(batch_tokens=8)
    harness.submit(2, "x" * 20, max_tokens=1)
    harness.run()
    harness.submit(1, "x" * 20 + "y" * 10, output=OutputParams(prefill_progress=True), max_tokens=1)
    harness.run()
    assert progress(harness) == [(28, 30), (30, 30)]


def test_progress_ends_at_the_whole_for_max_tokens_0_and_a_prompt_from_the_cache():
    harness = Harness(batch_tokens=32)
    harness.submit(2, "x" * 20, max_tokens=0)
    harness.run()
    harness.submit(1, "x" * 20, output=OutputParams(prefill_progress=True), max_tokens=0)
    harness.run()
    assert progress(harness) == [(20, 20)]


def test_progress_never_goes_back_after_an_abort_that_loses_the_prompt():
    harness = Harness(batch_tokens=8, can_cut=False)
    harness.submit(1, "x" * 20, output=OutputParams(prefill_progress=True), max_tokens=1)
    harness.step()
    harness.step()
    # All of it was computed, and one token of it must be computed again for its logits.
    harness.backend.fail_next(Outcome.ABORTED, kept=4)
    harness.run()
    done = [value for value, _ in progress(harness)]
    assert done == sorted(set(done))
    assert done[-1] == 20


def test_started_tells_what_was_cut_from_the_prompt():
    harness = Harness()
    harness.submit(1, "hello", truncated=7)
    harness.step()
    assert harness.events(1)[0] == Started(1, 5, 0, 8, truncated_tokens=7)
