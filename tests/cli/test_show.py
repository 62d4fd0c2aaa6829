"""`bear show`: a model, what is in its file, and its template alone."""

from __future__ import annotations

import pytest

from bear_grpc.cli import words
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import types_pb2 as types
from tests.cli.conftest import Bear
from tests.client import samples
from tests.client.fake_server import FakeServer


def rows(stdout: str, first_column: str) -> list[list[str]]:
    """The table that begins with this column, up to the empty line after it."""
    lines = stdout.splitlines()
    at = next(place for place, line in enumerate(lines) if line.split()[:1] == [first_column])
    end = next((place for place in range(at, len(lines)) if not lines[place]), len(lines))
    return [line.split() for line in lines[at + 1 : end]]


def test_show_prints_markup_as_it_is(bear: Bear) -> None:
    assert "a small [bold]model[/bold]" in bear("show", "demo").stdout


def test_show_asks_for_no_more_than_it_shows(bear: Bear, server: FakeServer) -> None:
    bear("show", "demo")
    assert server.last(models.GetModelRequest) == models.GetModelRequest(name="demo")


def test_show_tells_step_times_and_which_table_is_in_use(bear: Bear) -> None:
    lines = bear("show", "demo").stdout.splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("STEP TOKENS"))
    assert lines[at].split("  ") == ["STEP TOKENS", "MS PLAIN *", "MS REPACKED"]
    assert [line.split() for line in lines[at + 1 :]] == [["1", "27.0", "24.0"], ["16", "130.4"]]
    assert "STEP TOKENS" not in bear("show", "plain").stdout


def test_show_tells_the_mix_of_number_formats(bear: Bear) -> None:
    assert rows(bear("show", "demo").stdout, "TYPE") == [
        ["Q4_K", "134", "1B", "540", "MiB", "90.0%"],
        ["F32", "45", "92K", "60.0", "MiB", "10.0%"],
    ]


def test_show_metadata_tells_arrays_by_type_and_length(bear: Bear) -> None:
    assert "[32000 x string]" in bear("show", "demo", "--metadata").stdout
    assert "[32000 x string]" not in bear("show", "demo").stdout


def test_show_tensors_tells_each(bear: Bear) -> None:
    assert rows(bear("show", "demo", "--tensors").stdout, "TENSOR") == [
        ["output.weight", "Q6_K", "2048", "x", "32000", "50.0", "MiB"]
    ]
    assert "output.weight" not in bear("show", "demo").stdout


def test_show_template_prints_nothing_else(bear: Bear) -> None:
    result = bear("show", "demo", "--template")
    assert (result.stdout, result.stderr) == ("{{ messages }}\n", "")


def test_show_template_of_a_file_without_one_exits_1(bear: Bear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "METADATA", samples.METADATA[:1])
    result = bear("show", "demo", "--template")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "the file of bear-demo has no chat template\n"


@pytest.mark.parametrize("option", ["--metadata", "--tensors"])
def test_show_template_with_more_is_bad_usage(bear: Bear, option: str) -> None:
    assert bear("show", "demo", "--template", option).exit_code == 2


def test_show_of_a_file_on_the_hub_sends_the_reference(bear: Bear, server: FakeServer) -> None:
    name = "owner/tiny-GGUF/tiny.Q4_K_M.gguf"
    remote = types.Model(name=name, source=types.ModelSource(hub=samples.TINY_SOURCE))
    server.models = [remote]
    lines = bear("show", name).stdout.splitlines()
    assert ["source", name] in [line.split() for line in lines]
    assert not any(line.startswith("defaults") for line in lines)


def test_show_names_the_files_of_a_split_model_only(bear: Bear, server: FakeServer) -> None:
    one, two = types.ModelFile(file="a-1.gguf"), types.ModelFile(file="a-2.gguf")
    server.models = [types.Model(name="one", files=[one]), types.Model(name="two", files=[one, two])]
    assert "a-1.gguf" not in bear("show", "one").stdout
    assert "a-1.gguf, a-2.gguf" in bear("show", "two").stdout


@pytest.mark.parametrize(
    ("revision", "name"), [("", "o/r/f.gguf"), ("main", "o/r/f.gguf"), ("v1", "o/r/f.gguf@v1")]
)
def test_reference_names_a_revision_that_is_not_the_default(revision: str, name: str) -> None:
    assert words.reference(types.HubSource(repo_id="o/r", file="f.gguf", revision=revision)) == name
