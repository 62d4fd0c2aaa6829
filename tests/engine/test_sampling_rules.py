"""What may be drawn: enough tokens before an end, and only what a constraint allows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bear_grpc.backend.base import Logits, Matcher, Outcome
from bear_grpc.errors import ConstraintDeadEnd, ConstraintTooCostly
from bear_grpc.params import SamplingParams, StopParams
from bear_grpc.protocol import Ended, Finished
from bear_grpc.types import FinishReason, StopCause
from tests.engine.harness import GREEDY, FakeVocabulary, Harness, alone

VOCABULARY = FakeVocabulary()
EOS, END = VOCABULARY.eog_tokens()


def preferring(*tokens: int, temperature: float = 0.0) -> SamplingParams:
    """Draws the first of these that may be drawn."""
    bias = tuple((token, 1000.0 - 100 * place) for place, token in enumerate(tokens))
    return SamplingParams(temperature=temperature, repetition_penalty=1, top_k=0, top_p=1, logit_bias=bias)


# ---- min_tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("least", [0, 1, 3])
def test_min_tokens_put_off_an_end_of_generation(least, temperature):
    harness = Harness()
    sampling = preferring(EOS, END, 65, temperature=temperature)
    harness.submit(1, "hello", sampling=sampling, stop=StopParams(min_tokens=least))
    harness.run()
    result = harness.result(1)
    assert result.text == "A" * least
    assert result.cause == StopCause(eog_token=EOS)
    assert result.usage.completion_tokens == least + 1


def test_min_tokens_put_off_stop_tokens():
    harness = Harness()
    stop = StopParams(min_tokens=2, token_ids=(66, 67), ignore_eos=True)
    harness.submit(1, "hello", sampling=preferring(66, 67, 65), stop=stop)
    harness.run()
    assert harness.result(1).text == "AA"
    assert harness.result(1).cause == StopCause(token_id=66)


def test_min_tokens_do_not_put_off_stop_sequences():
    harness = Harness()
    stop = StopParams(min_tokens=6, sequences=("AA",))
    harness.submit(1, "hello", sampling=preferring(65), stop=stop)
    harness.run()
    assert harness.result(1).cause == StopCause(sequence="AA")
    assert harness.result(1).usage.completion_tokens == 2


def test_min_tokens_of_plain_greedy_take_the_best_of_the_rest():
    """No filter and no bias: the maximum of the row without its ends."""
    tokens = list(b"hello")
    harness = Harness(max_sequences=1)
    for seed in range(400):
        harness.backend._seed = seed
        row = harness.backend._logits_after(tokens)
        if int(row.argmax()) in (EOS, END):
            break
    else:
        raise AssertionError("no seed makes the model end at once")
    harness.submit(1, tokens, stop=StopParams(min_tokens=1), max_tokens=1)
    harness.run()
    row[[EOS, END]] = -np.inf
    assert harness.result(1).ids == (int(row.argmax()),)


def test_min_tokens_count_what_was_drawn_before_a_preemption():
    harness = Harness(max_sequences=2)
    harness.submit(2, "other")
    harness.submit(1, "hello", sampling=preferring(EOS, 65), stop=StopParams(min_tokens=3))
    harness.step()
    harness.step()
    harness.backend.fail_next(*[Outcome.NO_KV_ROOM] * 2)
    harness.run()
    assert harness.sequences[1].preemptions == 1
    assert harness.result(1).text == "AAA"


# ---- constraints ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Script(Matcher):
    """Allows at each place only what its list names; complete from `satisfied_at` tokens on."""

    places: list[set[int]]
    satisfied_at: int = 10**6
    finished_at: int = 10**6
    costly_at: int = 10**6
    done: int = 0

    def _allowed(self) -> set[int]:
        return self.places[self.done] if self.done < len(self.places) else set()

    def allows(self, token: int) -> bool:
        return token in self._allowed() or (self.is_satisfied() and VOCABULARY.is_eog(token))

    def mask(self, logits: Logits) -> Logits:
        row = np.full_like(logits, -np.inf)
        allowed = [token for token in range(len(logits)) if self.allows(token) and logits[token] > -np.inf]
        if not allowed:
            raise ConstraintDeadEnd("the script has no way on")
        row[allowed] = logits[allowed]
        return row

    def accept(self, token: int) -> None:
        if self.done >= self.costly_at:
            raise ConstraintTooCostly("the script is over")
        assert self.allows(token)
        if not VOCABULARY.is_eog(token):
            self.done += 1

    def is_satisfied(self) -> bool:
        return self.done >= self.satisfied_at

    def is_finished(self) -> bool:
        return self.done >= self.finished_at

    def copy(self) -> Script:
        return dataclasses.replace(self)


def ending(harness: Harness, id: int = 1) -> Finished | Ended:
    [ended] = harness.endings(id)
    return ended


def satisfied(harness: Harness, id: int = 1) -> bool | None:
    ended = ending(harness, id)
    assert isinstance(ended, Finished)
    return ended.satisfied


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=2)], ids=["greedy", "sampled"])
def test_constraint_allows_nothing_else(sampling):
    harness = Harness()
    script = Script([{97, 98}, {99}, {100, 101}], satisfied_at=3, finished_at=3)
    harness.submit(1, "hello", sampling=sampling, matcher=script)
    harness.run()
    a, b, c = harness.result(1).text
    assert (a in "ab", b, c in "de") == (True, "c", True)


def test_constraint_greedy_takes_the_best_of_what_is_allowed():
    harness = Harness()
    harness.submit(1, "hello", matcher=Script([set(range(97, 123))]), max_tokens=1)
    harness.run()
    row = harness.backend._logits_after(list(b"hello"))
    assert harness.result(1).ids == (97 + int(row[97:123].argmax()),)


def test_constraint_that_is_finished_ends_stop_without_a_cause():
    harness = Harness()
    harness.submit(1, "hello", matcher=Script([{97}, {98}], satisfied_at=2, finished_at=2), max_tokens=50)
    harness.run()
    result = harness.result(1)
    assert (result.text, result.reason, result.cause) == ("ab", FinishReason.STOP, None)
    assert satisfied(harness) is True


def test_constraint_that_is_satisfied_lets_the_model_end():
    harness = Harness()
    script = Script([{97}, {98}, {99}], satisfied_at=1)
    harness.submit(1, "hello", sampling=preferring(EOS, 98), matcher=script, stop=StopParams())
    harness.run()
    assert (harness.result(1).text, harness.result(1).cause) == ("a", StopCause(eog_token=EOS))
    assert satisfied(harness) is True


@pytest.mark.parametrize(("satisfied_at", "told"), [(3, False), (2, True)])
def test_constraint_cut_by_max_tokens_tells_whether_the_text_is_complete(satisfied_at, told):
    harness = Harness()
    script = Script([{97}] * 9, satisfied_at=satisfied_at)
    harness.submit(1, "hello", matcher=script, max_tokens=2)
    harness.run()
    assert harness.result(1).reason is FinishReason.LENGTH
    assert satisfied(harness) is told


def test_constraint_cut_by_a_stop_sequence_tells_that_it_is_not_complete():
    harness = Harness()
    stop = StopParams(sequences=("aa",))
    harness.submit(1, "hello", matcher=Script([{97}] * 9, satisfied_at=5), stop=stop)
    harness.run()
    assert harness.result(1).cause == StopCause(sequence="aa")
    assert satisfied(harness) is False


def test_satisfied_is_none_without_a_constraint():
    harness = Harness()
    harness.submit(1, "hello")
    harness.run()
    assert satisfied(harness) is None


def test_dead_end_fails_that_sequence_only():
    harness = Harness()
    harness.submit(1, "hello", matcher=Script([{97}, set()]))
    harness.submit(2, "other")
    harness.run()
    result = harness.result(1)
    assert (result.text, result.error.reason) == ("a", "CONSTRAINT_DEAD_END")
    assert harness.result(2) == alone("other")
    stats = harness.engine.stats()
    assert (stats.failed, stats.finished) == (1, 1)
    assert harness.is_clean()


def test_dead_end_by_min_tokens_is_one_for_that_sequence_only():
    """The constraint leaves nothing but an end, and that may not come yet."""
    harness = Harness()
    script = Script([{97}], satisfied_at=1)
    harness.submit(1, "hello", matcher=script, stop=StopParams(min_tokens=4))
    harness.submit(2, "other")
    harness.run()
    assert harness.result(1).error.reason == "CONSTRAINT_DEAD_END"
    assert harness.result(2) == alone("other")


def test_constraint_that_costs_too_much_fails_that_sequence_only():
    harness = Harness()
    harness.submit(1, "hello", matcher=Script([{97}] * 9, costly_at=2))
    harness.submit(2, "other")
    harness.run()
    result = harness.result(1)
    assert (result.text, result.error.reason) == ("aa", "CONSTRAINT_TOO_COSTLY")
    assert harness.result(2) == alone("other")
    assert harness.is_clean()


def test_two_dead_ends_in_one_step_do_not_break_the_engine():
    harness = Harness()
    for id in (1, 2):
        harness.submit(id, f"{id}", matcher=Script([set()]))
    harness.submit(3, "other", max_tokens=2)
    harness.run()
    assert [harness.result(id).error.reason for id in (1, 2)] == ["CONSTRAINT_DEAD_END"] * 2
    assert harness.result(3) == alone("other", max_tokens=2)


def test_constraint_goes_on_where_it_was_after_a_preemption():
    harness = Harness(max_sequences=2)
    harness.submit(2, "other")
    text = b"abcdef"
    harness.submit(1, "hello", matcher=Script([{byte} for byte in text], satisfied_at=6, finished_at=6))
    harness.step()
    harness.step()
    harness.backend.fail_next(*[Outcome.NO_KV_ROOM] * 2)
    harness.run()
    assert harness.sequences[1].preemptions == 1
    assert harness.result(1).text == "abcdef"


def test_row_without_any_usable_logit_fails_that_sequence_only():
    harness = Harness()
    never = tuple((token, float("-inf")) for token in range(VOCABULARY.size))
    harness.submit(1, "hello", sampling=SamplingParams(temperature=0, repetition_penalty=1, logit_bias=never))
    harness.submit(2, "other")
    harness.run()
    assert harness.result(1).error.reason == "CONSTRAINT_DEAD_END"
    assert harness.result(2) == alone("other")
    assert harness.is_clean()
