"""`bear usage`: sums of the record, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bear_grpc.access.usage import FILE, Group, Totals, UsageStore
from bear_grpc.cli import app

A, B = "engx2w4zuk", "hycjgspdvh"


def usage(folder: Path, *args: str) -> Result:
    environ = {"BEAR_STATE_DIR": str(folder)}
    return CliRunner().invoke(app, ["usage", *args], prog_name="bear", env=environ, catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with UsageStore(tmp_path) as store:
        store.add(
            {
                Group("2026-11-28", A, "tiny"): Totals(1, 10, 5, 20, 0),
                Group("2026-11-29", A, "demo"): Totals(2, 20, 0, 30, 1),
                Group("2026-11-29", B, "tiny"): Totals(3, 30, 0, 40, 0),
                Group("2026-11-29", "", ""): Totals(4, 0, 0, 0, 4),
            }
        )
    return tmp_path


@pytest.mark.parametrize(
    ("args", "rows"),
    [
        ((), [["2026-11-28", "1", "10", "5", "20", "0"], ["2026-11-29", "9", "50", "0", "70", "5"]]),
        (
            ("--by", "key"),
            [
                ["anonymous", "4", "0", "0", "0", "4"],
                [A, "3", "30", "5", "50", "1"],
                [B, "3", "30", "0", "40", "0"],
            ],
        ),
        (
            ("--by", "model", "--key", A),
            [["demo", "2", "20", "0", "30", "1"], ["tiny", "1", "10", "5", "20", "0"]],
        ),
        (("--by", "model", "--key", "anonymous"), [["none", "4", "0", "0", "0", "4"]]),
        (("--by", "key", "--model", "tiny", "--since", "2026-11-29"), [[B, "3", "30", "0", "40", "0"]]),
    ],
)
def test_lines_are_sums(folder: Path, args: tuple[str, ...], rows: list[list[str]]) -> None:
    result = usage(folder, "--since", "2026-01-01", *args)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split() for line in result.stdout.splitlines()[1:]] == rows


def test_json_has_numbers_by_name(folder: Path) -> None:
    result = usage(folder, "--json", "--by", "key", "--key", f"bear_{B}_secret", "--since", "2026-01-01")
    assert json.loads(result.stdout) == [
        {
            "key": B,
            "requests": 3,
            "prompt_tokens": 30,
            "cached_tokens": 0,
            "completion_tokens": 40,
            "errors": 0,
        }
    ]


def test_nothing_is_told_and_no_file_is_made(tmp_path: Path) -> None:
    result = usage(tmp_path, "--since", "2026-11-29")
    assert result.exit_code == 0 and "nothing was used since 2026-11-29" in result.stderr
    assert json.loads(usage(tmp_path, "--json", "--since", "999999w").stdout) == []
    assert not (tmp_path / FILE).exists()


def test_record_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database, but long enough to be taken for one" * 40)
    result = usage(tmp_path)
    assert result.exit_code == 1 and FILE in result.stderr
