"""Links inside the documentation lead somewhere, and the tests that docs/threats.md names are there."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "deploy/**/*.md", "clients/*.md", "clients/*/*.md", "bear_grpc/**/*.md")
PAGES = sorted({page for pattern in PATTERNS for page in ROOT.glob(pattern)})
THREATS = ROOT / "docs" / "threats.md"
_PARSER = MarkdownIt("commonmark").enable("table")


def tokens(text: str) -> Iterator[Token]:
    """Of a page in Markdown, in order, those within lines too."""
    for token in _PARSER.parse(text):
        yield token
        yield from token.children or ()


def links(text: str) -> list[tuple[str, str]]:
    """Where each link and picture leads, and its text."""
    found: list[tuple[str, str]] = []
    is_open = False
    for token in tokens(text):
        if token.type == "link_open":
            found.append((str(token.attrs["href"]), ""))
        elif token.type == "image":
            found.append((str(token.attrs["src"]), token.content))
        elif is_open and token.type in ("text", "code_inline"):
            target, told = found.pop()
            found.append((target, told + token.content))
        is_open = token.type == "link_open" or (is_open and token.type != "link_close")
    return found


def anchors(text: str) -> set[str]:
    """Those that GitHub gives to the headings of a page."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    parsed = _PARSER.parse(text)
    for heading, inline in pairwise(parsed):
        if heading.type != "heading_open":
            continue
        told = "".join(token.content for token in inline.children or ())
        name = re.sub(r"[^\w\- ]", "", told.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def problem(page: Path, target: str) -> str:
    """What is wrong with a link of a page, empty if nothing; of others' addresses nothing is known."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return ""
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not file.is_relative_to(ROOT) or not file.exists():
        return f"{target}: there is no such file"
    if parts.fragment and file.suffix == ".md" and parts.fragment not in anchors(file.read_text("utf-8")):
        return f"{target}: there is no such heading"
    return ""


def test_anchors_are_those_of_github() -> None:
    text = (
        "# A *b* `c_d`, e: f!\n## Twice\n## Twice\n### [Text](x.md) & more\n## Kühl/2.0\n```\n# none\n```\n"
    )
    assert anchors(text) == {"a-b-c_d-e-f", "twice", "twice-1", "text--more", "kühl20"}


def test_links_are_found_where_they_are_links_only() -> None:
    text = "[a `b`](c.md#d) ![p](q.svg) `[no](x.md)`\n\n| [in](t.md) |\n|-|\n\n```\n[no](x.md)\n```\n"
    assert links(text) == [("c.md#d", "a b"), ("q.svg", "p"), ("t.md", "in")]


def test_links_that_lead_nowhere_are_told() -> None:
    page = ROOT / "docs" / "security.md"
    assert not any(
        problem(page, target) for target in ("#api-keys", "../README.md", "cli.md", "https://a.b/#c")
    )
    assert all(problem(page, target) for target in ("#no", "no.md", "../../x", "cli.md#no"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    targets = [target for target, _ in links(page.read_text("utf-8"))]
    assert [told for target in targets if (told := problem(page, target))] == []


def test_every_page_of_docs_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        if page in reached:
            continue
        reached.add(page)
        found = (urlsplit(target) for target, _ in links(page.read_text("utf-8")))
        files = ((page.parent / parts.path).resolve() for parts in found if not parts.scheme)
        to_read += [file for file in files if file.suffix == ".md" and file.exists()]
    assert {*(ROOT / "docs").glob("*.md")} - reached == set()


def test_threats_name_tests_that_there_are() -> None:
    named = [(target, told) for target, told in links(THREATS.read_text("utf-8")) if "/tests/" in target]
    assert len(named) > 50
    missing = []
    for target, told in named:
        source = ast.parse((THREATS.parent / target).resolve().read_text("utf-8"))
        functions = {
            node.name for node in ast.walk(source) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        if f"test_{told.replace(' ', '_')}" not in functions:
            missing.append((target, told))
    assert missing == []
