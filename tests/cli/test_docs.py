"""docs/cli.md tells of every verb; it and all other pages of no verb, option or column that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bear_grpc.cli import app
from tests.cli.conftest import Bear
from tests.client import samples
from tests.client.fake_server import FakeServer

DOCS = Path(__file__).parents[2] / "docs"
DOC = (DOCS / "cli.md").read_text(encoding="utf-8")
PAGES = sorted(DOCS.glob("*.md"))
VERBS = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
GROUPS = [group.name for group in app.registered_groups]


@pytest.mark.parametrize("verb", [*VERBS, *GROUPS])
def test_every_verb_has_a_heading_and_a_screen(verb: str) -> None:
    assert re.search(rf"^### .*\bbear {verb}\b", DOC, re.MULTILINE)
    assert re.search(rf"^\$ .*\bbear {verb}\b", DOC, re.MULTILINE)


def commands(page: str) -> list[tuple[str, str, str]]:
    """Of each `bear VERB` at a prompt: the verb, the word after it, the rest without comment or pipe."""
    prompts = re.findall(r"^ *[$#] (.*)", page.replace("\\\n", " "), re.MULTILINE)
    # Not `kubectl -n bear VERB` or `sudo -u bear VERB`, and of `docker exec bear bear VERB` the second.
    command = re.compile(r"(?<!-[nu] )\bbear (?!bear\b)([a-z]+)(?: ([a-z]+))?((?:(?! # )[^|])*)")
    return [found for line in prompts for found in command.findall(line)]


def test_commands_of_a_page_are_found() -> None:
    page = (
        "  $ A=b bear load x \\\n  --pinned # why --not\n# bear keys create | c --d\n$ kubectl -n bear get\n"
    )
    found = [(verb, under, rest.split()) for verb, under, rest in commands(page)]
    assert found == [("load", "x", ["--pinned"]), ("keys", "create", [])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_its_options_are_there(bear: Bear, page: Path) -> None:
    for verb, under, rest in commands(page.read_text(encoding="utf-8")):
        assert verb in (*VERBS, *GROUPS), verb
        # Of a group, such as `bear keys`, the options are those of the verb within it.
        usage = bear(verb, *([under] if verb in GROUPS else []), "--help").stdout
        unknown = [option for option in re.findall(r"--[a-z-]+", rest) if option not in usage]
        assert unknown == [], verb


def test_every_option_in_the_text_is_one_of_some_verb(bear: Bear) -> None:
    usage = bear("--help").stdout + "".join(bear(verb, "--help").stdout for verb in VERBS)
    told = set(re.findall(r"`(--[a-z-]+)", DOC))
    assert told
    assert [option for option in told if option not in usage] == []


@pytest.mark.parametrize(
    "args",
    [("list", "--all"), ("ps",), ("prune", "--dry-run"), ("estimate", "demo"), ("keys", "list", "--all")],
)
def test_every_table_has_the_columns_that_are_printed(
    bear: Bear, server: FakeServer, args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAR_STATE_DIR", str(tmp_path))
    server.models = [samples.DEMO, samples.TINY]
    header = bear(*args).stdout.splitlines()[0].split()
    assert header in [line.split() for line in DOC.splitlines()]
