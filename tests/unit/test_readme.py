"""The README says what there is: settings, commands and reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bear_grpc.cli import app
from bear_grpc.config import ServerConfig, load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_only_settings_that_there_are_and_leads_to_all() -> None:
    table = README.split("| setting | default |")[1].split("\n\n")[0]
    told = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told
    assert told <= {*ServerConfig.__struct_fields__}
    assert "(docs/configuration.md)" in README


@pytest.mark.parametrize("name", ["listen", "auth", "keep_alive_s"])
def test_readme_tells_the_default_of_a_setting(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| `?([^|`]+)`? \|", README, re.MULTILINE)
    assert row is not None
    value = getattr(load_config(environ={}), name)
    default = value[0] if isinstance(value, list) else value
    told = row[1].strip()
    assert told == str(default) or float(told) == default


def test_readme_names_every_command() -> None:
    row = re.search(r"`bear (serve · [^`]+)`", README)
    assert row is not None
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    assert set(row[1].split(" · ")) == names | groups


def test_readme_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_names_every_make_target_that_it_tells_of() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    told = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert told
    assert told <= targets
