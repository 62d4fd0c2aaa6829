"""What the model card of bear-demo promises, asked over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from bear_grpc.client import AsyncClient
from bear_grpc.testing import serve_in_process
from tools.demo_model.facts import load_facts

MODEL = "bear-demo"
CLIENTS = 4


async def share_right(questions: Sequence[tuple[str, str]], *, chat: bool) -> float:
    """The share of questions that are answered word for word, by the model's own defaults."""
    waiting = list(questions)
    right = 0

    async def ask(client: AsyncClient) -> None:
        nonlocal right
        while waiting:
            question, answer = waiting.pop()
            if chat:
                reply = await client.generate_once(MODEL, messages=[{"role": "user", "content": question}])
            else:
                reply = await client.generate_once(MODEL, question)
            right += reply.choices[0].text.strip() == answer

    async with serve_in_process() as address, AsyncClient(address) as client:
        await asyncio.gather(*(ask(client) for _ in range(CLIENTS)))
    return right / len(questions)


@pytest.mark.model
async def test_demo_model_first_phrasing_of_facts_is_answered_word_for_word() -> None:
    questions = [(fact.ask[0], fact.answer) for fact in load_facts()][::4]
    assert await share_right(questions, chat=True) >= 0.95


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "raw"])
async def test_demo_model_trained_questions_are_answered_word_for_word(chat: bool) -> None:
    questions = [(question, fact.answer) for fact in load_facts() for question in fact.ask]
    assert await share_right(questions, chat=chat) >= 0.95


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "raw"])
async def test_demo_model_held_out_questions_are_mostly_answered_right(chat: bool) -> None:
    questions = [(question, fact.answer) for fact in load_facts() for question in fact.held_out]
    assert await share_right(questions, chat=chat) >= 0.60
