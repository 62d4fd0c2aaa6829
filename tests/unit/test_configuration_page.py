"""docs/configuration.md is what the types of the settings tell, and they tell everything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bear_grpc.config.fields import all_settings
from bear_grpc.config.reference import reference
from tools.configuration import flags_of_serve, main

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "configuration.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_types_tell() -> None:
    assert reference(flags_of_serve()) == PAGE, "python -m tools.configuration writes it"
    assert main(["--check"]) == 0


@pytest.mark.parametrize("name", all_settings())
def test_every_setting_has_a_description_and_a_row(name: str) -> None:
    setting = all_settings()[name]
    assert setting.description, f"{name}: Annotated[..., about(description)] in bear_grpc/config/settings.py"
    assert setting.type_name
    section = PAGE.split(f"## `[{setting.table}]`" if setting.table else "## Outside of tables")[1]
    (row,) = [
        line
        for line in section.split("\n## ")[0].splitlines()
        if line.startswith(f"| `{name.rpartition('.')[2]}` |")
    ]
    assert setting.description in row
    assert setting.variable in row


def test_flags_of_serve_are_told() -> None:
    assert flags_of_serve()["models_dir"] == "--models-dir"
    assert [flag for flag in flags_of_serve().values() if f"`{flag}`" not in PAGE] == []


def test_links_of_the_page_lead_to_headings() -> None:
    for file, _, anchor in re.findall(r"\]\(([^)#]+)(#([^)]+))?\)", PAGE):
        text = (DOCS / file).read_text(encoding="utf-8")
        headings = {
            re.sub(r"[^\w -]", "", line.strip("# ")).lower().replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        }
        assert not anchor or anchor in headings
