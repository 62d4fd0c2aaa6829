"""docs/cli.md tells of every verb, and of no option and no column that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bear_grpc.cli import app
from tests.cli.conftest import Bear
from tests.client import samples
from tests.client.fake_server import FakeServer

DOC = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
VERBS = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_heading_and_a_screen(verb: str) -> None:
    assert re.search(rf"^### .*\bbear {verb}\b", DOC, re.MULTILINE)
    assert re.search(rf"^\$ .*\bbear {verb}\b", DOC, re.MULTILINE)


def test_every_option_of_a_screen_is_one_of_its_verb(bear: Bear) -> None:
    lines = re.findall(r"^\$ .*?\bbear ([a-z]+)([^\n]*)", DOC, re.MULTILINE)
    assert lines
    for verb, rest in lines:
        usage = bear(verb, "--help").stdout
        assert [option for option in re.findall(r"--[a-z-]+", rest) if option not in usage] == []


def test_every_option_in_the_text_is_one_of_some_verb(bear: Bear) -> None:
    usage = bear("--help").stdout + "".join(bear(verb, "--help").stdout for verb in VERBS)
    told = set(re.findall(r"`(--[a-z-]+)", DOC))
    assert told
    assert [option for option in told if option not in usage] == []


@pytest.mark.parametrize("args", [("list", "--all"), ("ps",), ("prune", "--dry-run"), ("estimate", "demo")])
def test_every_table_has_the_columns_that_are_printed(
    bear: Bear, server: FakeServer, args: tuple[str, ...]
) -> None:
    server.models = [samples.DEMO, samples.TINY]
    header = bear(*args).stdout.splitlines()[0].split()
    assert header in [line.split() for line in DOC.splitlines()]
