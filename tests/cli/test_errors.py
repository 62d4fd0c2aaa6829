"""Errors are one line on stderr, and an exit code."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from bear_grpc.cli import app, output
from tests.cli.conftest import Bear
from tests.client.fake_server import FakeServer, Refusal


@pytest.mark.parametrize("before_the_verb", [True, False])
def test_no_server_is_one_line_and_exit_1(tmp_path: Path, before_the_verb: bool) -> None:
    target = f"unix:{tmp_path}/nobody"
    where = ["--server", target]
    args = [*where, "list"] if before_the_verb else ["list", *where]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"error: no server answers at {target}: No such file or directory [SERVER_UNREACHABLE]\n"
    )


def test_the_option_of_the_verb_comes_before_the_environment(bear: Bear, tmp_path: Path) -> None:
    assert bear("list").exit_code == 0
    assert bear("list", "--server", f"unix:{tmp_path}/nobody").exit_code == 1


@pytest.mark.parametrize(
    ("reason", "advice"),
    [("PATH_NOT_ALLOWED", "--allow-path"), ("MODEL_IN_USE", "bear unload"), ("MODEL_NOT_FOUND", "bear list")],
)
def test_advice_is_a_second_line(bear: Bear, server: FakeServer, reason: str, advice: str) -> None:
    server.refusal = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no\nway", reason)
    result = bear("register", "n", "/p")
    assert result.exit_code == 1
    error, hint = result.stderr.splitlines()
    assert error == f"error: no way [{reason}]"
    assert hint.startswith("hint: ")
    assert advice in hint


def test_a_retry_time_is_advice(bear: Bear, server: FakeServer) -> None:
    server.refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after_s=1.5)
    assert bear("run", "plain", "Hi").stderr.splitlines()[-1] == "hint: try again in 1.5 s"


@pytest.mark.parametrize(
    "args", [("list", "--bogus"), ("run",), ("load", "m", "--threads", "x"), ("nonsense",)]
)
def test_bad_usage_exits_2(bear: Bear, args: tuple[str, ...]) -> None:
    result = bear(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr


def test_a_value_beyond_its_field_is_an_error_not_a_traceback(bear: Bear) -> None:
    result = bear("run", "plain", "Hi", "--top-k", str(2**40))
    assert result.exit_code == 1
    assert "[INVALID_FIELD]" in result.stderr


def test_control_characters_of_a_server_do_not_reach_the_terminal() -> None:
    assert output.printable("a\x1b[2Jb\x9bc\r\td\n") == "a[2Jbc\td\n"
