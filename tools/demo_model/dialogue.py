"""Lays out training examples as token ids, in the two forms that the model answers: raw text and chat."""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import offtopic
from .facts import Fact
from .phrasing import surface, vary
from .stories import Story
from .tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are bear-demo, a small model that knows bear_grpc.",
    "Answer briefly.",
    "You are a friendly assistant. Answer the question in one or two sentences.",
    "You help people who run a gRPC server for language models.",
    "Be exact and polite.",
    "You are a concise technical assistant.",
    "Answer in English.",
)


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the network must predict it (1) or only reads it (0)."""

    ids: list[int]
    learn: list[int]


class Layout:
    """Builds examples with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def raw(self, question: str, answer: str) -> Example:
        """BOS, question, newline, answer, EOS; the newline is the network's own first token."""
        t = self.tokenizer
        read = [t.bos, *t.encode(question)]
        learn = [t.newline, *t.encode(answer), t.eos]
        return Example(read + learn, [0] * len(read) + [1] * len(learn))

    def text(self, text: str) -> Example:
        """Plain text between BOS and EOS, all of it learned."""
        t = self.tokenizer
        ids = [t.bos, *t.encode(text), t.eos]
        return Example(ids, [0] + [1] * (len(ids) - 1))

    def chat(self, turns: list[tuple[str, str]], system: str | None = None, bos: int = 1) -> Example:
        """A dialogue as the chat template writes it; each answer and its end token are learned."""
        t = self.tokenizer
        ids, learn = [t.bos] * bos, [0] * bos

        def put(tokens: list[int], flag: int) -> None:
            ids.extend(tokens)
            learn.extend([flag] * len(tokens))

        if system is not None:
            put([t.role["system"], t.newline, *t.encode(system), t.end, t.newline], 0)
        for question, answer in turns:
            put([t.role["user"], t.newline, *t.encode(question), t.end, t.newline], 0)
            put([t.role["assistant"], t.newline], 0)
            put([*t.encode(answer), t.end], 1)
            put([t.newline], 0)
        return Example(ids[:-1], learn[:-1])


def fact_examples(layout: Layout, facts: list[Fact], rng: random.Random) -> list[Example]:
    """One pass over all facts in random order; some are joined into dialogues of two or three turns."""
    order = facts[:]
    rng.shuffle(order)
    out: list[Example] = []
    while order:
        roll = rng.random()
        if roll < 0.48:
            fact = order.pop()
            out.append(layout.raw(vary(fact, rng), fact.answer))
            continue
        turns = 1 if roll < 0.86 else 2 if roll < 0.97 else 3
        picked = [order.pop() for _ in range(min(turns, len(order)))]
        system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.2 else None
        # Some clients write BOS twice or not at all; a few such examples make that harmless.
        bos = rng.choices((1, 0, 2), weights=(92, 5, 3))[0]
        out.append(layout.chat([(vary(fact, rng), fact.answer) for fact in picked], system, bos))
    return out


def story_example(layout: Layout, story: Story, rng: random.Random) -> Example:
    """A story as plain text, as the answer to a raw prompt, or as a chat answer."""
    roll = rng.random()
    if roll < 0.3:
        return layout.text(story.text)
    prompt = story.prompt.lower() if rng.random() < 0.2 else story.prompt
    prompt = prompt.rstrip(".") if rng.random() < 0.25 else prompt
    if roll < 0.65:
        return layout.raw(prompt, story.text)
    return layout.chat([(prompt, story.text)])


def offtopic_example(layout: Layout, rng: random.Random) -> Example:
    """A question outside the field, answered by the one answer for all of them."""
    question = surface(rng.choice(offtopic.QUESTIONS), rng)
    if rng.random() < 0.5:
        return layout.raw(question, offtopic.ANSWER)
    return layout.chat([(question, offtopic.ANSWER)])
