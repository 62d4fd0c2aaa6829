"""Errors are one line on stderr, and an exit code."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from bear_grpc import errors
from bear_grpc.cli import app, output
from bear_grpc.cli.advice import report
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
    [
        ("PATH_NOT_ALLOWED", "--allow-path"),
        ("MODEL_IN_USE", "bear unload"),
        ("MODEL_NOT_FOUND", "bear list --all"),
        ("HUB_ACCESS_DENIED", "BEAR_HUB_TOKEN="),
        ("LOAD_COOLDOWN", "bear load"),
        ("CHECKSUM_MISMATCH", "bear prune"),
    ],
)
def test_advice_is_a_second_line(bear: Bear, server: FakeServer, reason: str, advice: str) -> None:
    server.refusal = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no\nway", reason)
    result = bear("register", "n", "/p")
    assert result.exit_code == 1
    error, hint = result.stderr.splitlines()
    assert error == f"error: no way [{reason}]"
    assert hint.startswith("hint: ")
    assert advice in hint


def shown(error: errors.BearError, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The error's line and its advice."""
    report(error)
    line, hint = capsys.readouterr().err.splitlines()
    return line, hint


@pytest.mark.parametrize("kind", [errors.DiskFull, errors.InsufficientMemory])
def test_what_is_needed_and_free_are_both_told(
    kind: type[errors.DiskFull], capsys: pytest.CaptureFixture[str]
) -> None:
    line, hint = shown(kind("tiny", needed_bytes=4 << 30, free_bytes=1 << 30), capsys)
    assert "'tiny' needs 4096 MiB" in line
    assert "1024 MiB are free" in line
    assert hint.startswith("hint: 3.0 GiB more are needed; `bear ")
    assert " tiny`" in hint


@pytest.mark.parametrize("needed", ["", "many", "-1", "5"])
def test_a_number_that_is_none_is_left_out(needed: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = errors.ErrorRecord("DISK_FULL", "full", {"needed_bytes": needed, "free_bytes": "7"})
    _, hint = shown(errors.from_record(record), capsys)
    assert hint.startswith("hint: `bear prune`")


def test_nearest_names_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    line, hint = shown(errors.ModelNotFound("bear-dem", ["bear-demo", "beard"]), capsys)
    assert "did you mean bear-demo or beard?" in line
    assert hint == "hint: `bear list --all` shows the models of this server"
    record = errors.ErrorRecord("MODEL_NOT_FOUND", "unknown", {"nearest": "bear-demo,beard"})
    _, hint = shown(errors.from_record(record), capsys)
    assert hint.startswith("hint: did you mean bear-demo or beard? `bear list --all`")


def test_advice_names_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    _, hint = shown(errors.ModelInUse("tiny"), capsys)
    assert hint == "hint: `bear unload tiny` unloads it, `bear pull --cancel tiny` ends its download"


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
