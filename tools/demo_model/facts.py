"""Reads the facts: `facts/*.toml`, one file per subject, one table per fact.

A fact has one answer, phrasings that are trained (`ask`) and phrasings that are never trained (`held_out`).
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

FACTS_DIR = Path(__file__).parent / "facts"


@dataclass(frozen=True)
class Fact:
    """One thing the model knows."""

    id: str
    answer: str
    ask: tuple[str, ...]
    held_out: tuple[str, ...]


def normalize(question: str) -> str:
    """Form in which two phrasings count as the same: lower case, words only."""
    return " ".join(re.findall(r"[a-z0-9_]+", question.lower()))


def load_facts(directory: Path = FACTS_DIR) -> list[Fact]:
    """All facts in order of file name and place, checked.

    Raises:
        ValueError: a fact breaks a rule of `check`.
    """
    facts: list[Fact] = []
    for path in sorted(directory.glob("*.toml")):
        for name, table in tomllib.loads(path.read_text(encoding="ascii")).items():
            facts.append(Fact(name, table["answer"], tuple(table["ask"]), tuple(table["held_out"])))
    check(facts)
    return facts


def check(facts: list[Fact]) -> None:
    """Refuses doubled ids, answers and phrasings, too few phrasings, and answers of an odd length."""
    ids: set[str] = set()
    answers: set[str] = set()
    asked: dict[str, str] = {}
    for fact in facts:
        words = len(fact.answer.split())
        if fact.id in ids or fact.answer in answers:
            raise ValueError(f"{fact.id}: id or answer occurs twice")
        if not 5 <= len(fact.ask) <= 8 or len(fact.held_out) != 2:
            raise ValueError(f"{fact.id}: needs 5 to 8 trained and 2 held-out phrasings")
        if not 12 <= words <= 36:
            raise ValueError(f"{fact.id}: answer has {words} words")
        ids.add(fact.id)
        answers.add(fact.answer)
        for question in (*fact.ask, *fact.held_out):
            key = normalize(question)
            if key in asked:
                raise ValueError(f"{fact.id}: {question!r} is also asked by {asked[key]}")
            asked[key] = fact.id
