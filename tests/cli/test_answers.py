"""Answers on the terminal: in order whatever order they come in, their numbers after each."""

from __future__ import annotations

import pytest

from bear_grpc.cli.answers import Answers, likelihood, statistics
from bear_grpc.cli.progress import stage_name
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import types_pb2 as types

COMPLETED = inference.Completed(finish_reason=inference.FINISH_REASON_LENGTH)
TOKEN = inference.Token(
    id=5, piece=b" a", logprob=-0.25, top=[inference.TopToken(id=6, piece=b"\xff", logprob=-0.125)]
)


def delta(index: int, text: str, *tokens: inference.Token) -> inference.GenerateResponse:
    return inference.GenerateResponse(index=index, delta=inference.Delta(text=text, tokens=tokens))


def end(index: int) -> inference.GenerateResponse:
    return inference.GenerateResponse(index=index, completed=COMPLETED)


def test_answers_stream_the_first_and_keep_the_second(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers(2, quiet=True)
    answers.add(delta(1, "b"))
    assert capsys.readouterr().out == ""
    answers.add(delta(0, "a"))
    assert capsys.readouterr().out == "a"
    answers.add(end(1))
    assert capsys.readouterr().out == ""
    answers.add(end(0))
    assert capsys.readouterr().out == "\nb\n"


def test_answers_stream_the_second_when_the_first_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers(2, quiet=True)
    for event in (delta(1, "b"), delta(0, "a"), end(0)):
        answers.add(event)
    assert capsys.readouterr().out == "a\nb"
    answers.add(delta(1, "c"))
    assert capsys.readouterr().out == "c"
    assert [answers.text(index) for index in (0, 1)] == ["a", "bc"]


def test_answers_that_are_cut_end_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers()
    answers.add(delta(0, "a"))
    answers.close()
    answers = Answers()
    answers.close()
    assert capsys.readouterr().out == "a\n"


def test_answers_tell_the_tokens_of_each_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers(2)
    for event in (delta(1, "b", TOKEN), delta(0, "a"), end(0), end(1)):
        answers.add(event)
    shown = capsys.readouterr()
    assert shown.out == "a\nb\n"
    headed = [line for line in shown.err.splitlines() if line.startswith("---") or "' a'" in line]
    assert headed == ["--- answer 1 of 2", "--- answer 2 of 2", likelihood(TOKEN)]


def test_likelihood_shows_the_token_and_the_likeliest() -> None:
    assert likelihood(TOKEN).split() == ["-0.250", "'", "a'", r"'\\xff'", "-0.125"]


def test_likelihood_of_a_token_without_one_shows_the_token() -> None:
    assert likelihood(inference.Token(id=1, piece=b"x")).strip() == "'x'"


@pytest.mark.parametrize(("satisfied", "told"), [(False, True), (True, False), (None, False)])
def test_statistics_tell_a_constraint_that_is_not_satisfied(satisfied: bool | None, told: bool) -> None:
    completed = inference.Completed(constraint_satisfied=satisfied)
    assert ("constraint not satisfied" in statistics(completed)) is told


def test_statistics_leave_the_prompt_out_where_another_answer_counts_it() -> None:
    assert statistics(inference.Completed()).startswith("0 completion tokens")
    counted = inference.Completed(usage=inference.Usage(prompt_token_count=7, cached_token_count=3))
    assert statistics(counted).startswith("7 prompt tokens (3 cached), 0 completion tokens")


def test_stage_every_one_of_the_contract_has_words() -> None:
    stages = [value for value in types.LoadStage.values() if value]
    assert len({stage_name(stage) for stage in stages} - {"loading"}) == len(stages)
