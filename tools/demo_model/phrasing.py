"""Turns one phrasing of a question into many: the augmentation that makes unseen phrasings work.

Only the question changes, never the answer. A variant that equals a held-out phrasing is thrown away.
"""

from __future__ import annotations

import random
import re

from .facts import Fact, normalize

# Openings that ask for the same thing; a match is replaced by another member of its group.
_OPENINGS: tuple[tuple[str, ...], ...] = (
    ("What is ", "What's ", "Explain ", "Define ", "Describe ", "Tell me about ", "What exactly is "),
    ("What are ", "Explain ", "Describe ", "Tell me about ", "What exactly are "),
    ("What does ", "Explain what does ", "Tell me what does ", "Can you say what does "),
    ("How do I ", "How can I ", "How to ", "How would I ", "Show me how to ", "What is the way to "),
    ("How does ", "Explain how does ", "In what way does ", "Tell me how does "),
    ("What happens if ", "What happens when ", "What if ", "What will happen if "),
    ("What happens when ", "What happens if ", "What will happen when ", "Tell me what happens when "),
    ("Which ", "What ", "Tell me which ", "Name which "),
    ("Why does ", "Why do ", "For what reason does ", "Explain why does "),
    ("Why is ", "For what reason is ", "Explain why is ", "How come "),
    ("Can I ", "Is it possible to ", "May I ", "Am I able to "),
    ("Explain ", "Describe ", "What is ", "Can you explain ", "Please explain "),
    ("What does the ", "What is the purpose of the ", "What is the use of the "),
    ("When ", "At what time ", "In which case "),
)
_PREFIXES = (
    "Please tell me: ", "Hi, ", "Hello, ", "Quick question: ", "I want to know: ", "Could you say: ",
    "I am new here. ", "One more thing: ", "And ", "So, ", "Please answer: ", "Question: ", "OK, ", "Also, ",
)  # fmt: skip
_SUFFIXES = (" please", ", please", " in short", " exactly", " here", " in bear_grpc", " then", " Thanks.")
_STOPWORDS = frozenset(
    word
    for words in (
        "a an the this that there is are do does did can be",
        "of to in on for with by at as and",
        "i me my you it its",
    )
    for word in words.split()
)
_SWAPS: dict[str, tuple[str, ...]] = {
    "server": ("service", "server"),
    "service": ("server", "service"),
    "mean": ("stand for", "signify", "say"),
    "means": ("stands for", "signifies"),
    "get": ("receive", "obtain", "have"),
    "use": ("take", "choose", "apply", "pick"),
    "set": ("change", "choose", "configure"),
    "change": ("set", "adjust"),
    "see": ("view", "find", "look at"),
    "find": ("see", "look up", "get"),
    "show": ("display", "list", "print"),
    "start": ("run", "launch", "begin"),
    "stop": ("end", "halt", "terminate"),
    "ends": ("stops", "finishes"),
    "happens": ("occurs", "follows"),
    "return": ("give back", "report", "answer"),
    "returns": ("gives back", "reports"),
    "difference": ("distinction",),
    "purpose": ("use", "point", "job"),
    "work": ("function", "operate"),
    "large": ("big",),
    "big": ("large",),
    "choose": ("pick", "select"),
    "client": ("caller", "client"),
    "need": ("require",),
    "allowed": ("permitted",),
    "error": ("failure", "error"),
    "fast": ("quick",),
    "make": ("build", "create"),
    "meaning": ("sense", "definition"),
}
_NAME = re.compile(r"[A-Z_0-9]{2,}[?.]?|.*_.*")


def vary(fact: Fact, rng: random.Random) -> str:
    """A random variant of a random trained phrasing; often the phrasing itself."""
    question = rng.choice(fact.ask)
    for _ in range(4):
        variant = _rewrite(question, rng) if rng.random() < 0.72 else question
        variant = surface(variant, rng)
        if normalize(variant) not in {normalize(text) for text in fact.held_out}:
            return variant
    return question


def _rewrite(question: str, rng: random.Random) -> str:
    """Changes words: opening, synonyms, dropped words."""
    if rng.random() < 0.5:
        groups = [group for group in _OPENINGS if question.startswith(group[0])]
        if groups:
            group = rng.choice(groups)
            question = rng.choice(group) + question[len(group[0]) :]
    words = question.split(" ")
    out: list[str] = []
    for word in words:
        bare = word.strip("?.,!:").lower()
        if bare in _SWAPS and rng.random() < 0.3:
            word = word.lower().replace(bare, rng.choice(_SWAPS[bare]))
        elif rng.random() < _drop_rate(word, bare):
            continue
        out.append(word)
    if len(out) > 3 and rng.random() < 0.05:
        at = rng.randrange(len(out) - 1)
        out[at], out[at + 1] = out[at + 1], out[at]
    return " ".join(out) if len(out) >= 2 else question


def _drop_rate(word: str, bare: str) -> float:
    # A name carries the question, so it is dropped rarely; small words carry little.
    if _NAME.fullmatch(word):
        return 0.01
    return 0.2 if bare in _STOPWORDS else 0.06


def surface(question: str, rng: random.Random) -> str:
    """Changes case, punctuation and politeness."""
    roll = rng.random()
    if roll < 0.12:
        question = rng.choice(_PREFIXES) + question
    elif roll < 0.2:
        body, mark = (question[:-1], question[-1]) if question[-1:] in "?.!" else (question, "")
        question = body + rng.choice(_SUFFIXES) + mark
    roll = rng.random()
    if roll < 0.22:
        question = question.rstrip("?.! ")
    elif roll < 0.27:
        question = question.rstrip("?.! ") + rng.choice((".", "?", "??", "!"))
    roll = rng.random()
    if roll < 0.25:
        question = question.lower()
    elif roll < 0.32:
        question = question[:1].lower() + question[1:]
    if rng.random() < 0.04 and len(question) > 12:
        # A typing error: one letter lost or doubled.
        at = rng.randrange(3, len(question) - 2)
        question = question[:at] + (question[at] * 2 if rng.random() < 0.5 else "") + question[at + 1 :]
    return question.strip()
