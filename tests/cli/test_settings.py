"""`bear config`: the settings in force, each with where it was told, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bear_grpc.config import ServerConfig
from tests.cli.conftest import Bear


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "bear.toml"
    file.write_text('hub_token = "hf_secret"\noffline = true\n')
    return file


def test_settings_are_printed_with_their_origins_and_without_secrets(
    bear: Bear, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAR_MAX_PULLS", "5")
    result = bear("config", "--config", str(file), "--set", "limits.max_answers=4")
    assert result.exit_code == 0
    lines = {line.split(" = ")[0]: line.split() for line in result.stdout.splitlines()}
    assert result.stdout.startswith(f"# file: {file}\n")
    assert lines["offline"] == ["offline", "=", "true", "#", f"{file}:2"]
    assert lines["hub_token"][2:] == ['"***"', "#", f"{file}:1"]
    assert lines["max_pulls"][2:] == ["5", "#", "BEAR_MAX_PULLS"]
    assert lines["max_answers"][2:] == ["4", "#", "--set"]
    assert lines["stop_grace_s"][2:] == ["30.0", "#", "default"]
    assert "hf_secret" not in result.stdout + result.stderr


def test_settings_are_printed_as_json(bear: Bear, file: Path) -> None:
    told = json.loads(bear("config", "--config", str(file), "--json").stdout)
    assert told["file"] == str(file)
    assert told["settings"]["offline"] == {"value": True, "origin": f"{file}:2"}
    assert told["settings"]["hub_token"]["value"] == "***"


def test_a_variable_names_the_file(bear: Bear, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAR_CONFIG", str(file))
    assert json.loads(bear("config", "--json").stdout)["file"] == str(file)
    monkeypatch.setenv("BEAR_CONFIG", "")
    assert json.loads(bear("config", "--json").stdout)["file"] is None


def test_a_good_file_is_told_so_whatever_the_environment_says(
    bear: Bear, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAR_MAX_PULLS", "many")
    result = bear("config", "--check", str(file))
    assert (result.stdout, result.exit_code) == (f"{file}: nothing is wrong\n", 0)


def test_every_problem_of_a_file_is_a_line(bear: Bear, file: Path) -> None:
    file.write_text("offline = 1\n[limits]\nmax_answer = 1\n")
    result = bear("config", "--check", str(file))
    assert (result.stdout, result.exit_code) == ("", 78)
    assert result.stderr.splitlines() == [
        f"error: {file}:1: offline: expected `bool`, got `int`",
        f"error: {file}:3: there is no setting 'limits.max_answer'; did you mean 'limits.max_answers'?",
    ]


def test_a_file_that_is_not_there_is_told(bear: Bear, tmp_path: Path) -> None:
    for args in (("--check",), ("--config",)):
        result = bear("config", *args, str(tmp_path / "gone.toml"))
        assert result.exit_code == 78
        assert "gone.toml: No such file" in result.stderr


def test_an_assignment_without_a_value_is_wrong_usage(bear: Bear) -> None:
    assert bear("config", "--set", "offline").exit_code == 2


def test_serve_takes_assignments_and_reads_them_again(
    bear: Bear, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[ServerConfig] = []

    def serve(config: ServerConfig, reread: object, hangups: object) -> int:
        configs.append(config)
        file.write_text("offline = false\nmax_pulls = 7\n")
        configs.append(reread())  # type: ignore[operator]
        return 0

    monkeypatch.setattr("bear_grpc.serving.serve", serve)
    assert bear("serve", "--config", str(file), "--set", "stop_grace_s=3").exit_code == 0
    first, second = configs
    assert (first.offline, first.hub_token, first.stop_grace_s) == (True, "hf_secret", 3.0)
    assert (second.offline, second.max_pulls, second.stop_grace_s) == (False, 7, 3.0)
