"""What each verb asks, and what it prints where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import types_pb2 as types
from tests.cli.conftest import Bear
from tests.client.fake_server import FakeServer


@pytest.mark.parametrize(
    "args",
    [
        ("list",),
        ("ps",),
        ("show", "demo", "--metadata"),
        ("load", "demo"),
        ("unload", "demo"),
        ("register", "n", "/models/n.gguf"),
        ("rm", "n"),
        ("tokenize", "demo", "hello"),
        ("health",),
        ("info",),
    ],
    ids=" ".join,
)
def test_json_alone_is_on_stdout(bear: Bear, args: tuple[str, ...]) -> None:
    result = bear(*args, "--json")
    assert result.exit_code == 0
    assert isinstance(json.loads(result.stdout), dict)
    assert result.stderr == ""


def test_json_is_the_message_with_the_contracts_names(bear: Bear) -> None:
    answer = json.loads(bear("list", "--json").stdout)
    assert [model["name"] for model in answer["models"]] == ["bear-demo", "plain"]
    assert answer["models"][0]["size_bytes"] == str(10 << 20)
    assert answer["models"][0]["status"]["state"] == "MODEL_STATE_READY"
    assert answer["models"][0]["status"]["waiting_count"] == 0


def test_list_shows_every_model_in_a_line(bear: Bear) -> None:
    header, *lines = bear("list").stdout.splitlines()
    assert header.split()[:3] == ["NAME", "STATE", "SIZE"]
    assert [line.split()[:2] for line in lines] == [["bear-demo", "READY"], ["plain", "AVAILABLE"]]
    assert "124M" in lines[0]


def test_a_long_name_is_not_cut_where_no_person_looks(bear: Bear, server: FakeServer) -> None:
    server.models = [types.Model(name="owner/" + "x" * 120)]
    assert "owner/" + "x" * 120 in bear("list").stdout


def test_ps_asks_for_the_loaded_models(bear: Bear, server: FakeServer) -> None:
    result = bear("ps")
    assert list(server.last(models.ListModelsRequest).states) == [
        types.MODEL_STATE_LOADING,
        types.MODEL_STATE_READY,
        types.MODEL_STATE_UNLOADING,
    ]
    assert result.stdout.splitlines()[1].split() == [
        *("bear-demo", "READY", "1", "0", "10%", "1%", "12.0", "MiB", "33", "22", "44", "5", "never")
    ]


def test_show_prints_markup_as_it_is(bear: Bear) -> None:
    assert "a small [bold]model[/bold]" in bear("show", "demo").stdout


def test_show_tells_step_times_and_which_table_is_in_use(bear: Bear) -> None:
    lines = bear("show", "demo").stdout.splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("STEP TOKENS"))
    assert lines[at].split("  ") == ["STEP TOKENS", "MS PLAIN *", "MS REPACKED"]
    assert [line.split() for line in lines[at + 1 :]] == [["1", "27.0", "24.0"], ["16", "130.4"]]
    assert "STEP TOKENS" not in bear("show", "plain").stdout


def test_show_metadata_tells_arrays_by_type_and_length(bear: Bear) -> None:
    assert "[32000 x string]" in bear("show", "demo", "--metadata").stdout
    assert "[32000 x string]" not in bear("show", "demo").stdout


def test_load_gives_only_the_options_that_are_given(bear: Bear, server: FakeServer) -> None:
    result = bear(
        *("load", "demo", "--gpu-layers", "0", "--no-mmap", "--kv-cache-type", "q8_0", "--keep-alive", "5m")
    )
    assert server.last(models.LoadModelRequest).options == types.LoadOptions(
        gpu_layers=0, mmap=False, kv_cache_type=types.KV_CACHE_TYPE_Q8_0, keep_alive=Duration(seconds=300)
    )
    assert result.stdout == "bear-demo is ready after 500 ms: 4 sequences of up to 2048 tokens, 12.0 MiB\n"
    assert result.stderr == ""


def test_keep_alive_may_be_negative(bear: Bear, server: FakeServer) -> None:
    bear("load", "demo", "--keep-alive", "-1")
    assert server.last(models.LoadModelRequest).options.keep_alive.seconds == -1


def test_every_load_option_has_a_flag(bear: Bear) -> None:
    usage = bear("load", "--help").stdout
    for field in types.LoadOptions.DESCRIPTOR.fields:
        assert "--" + field.name.replace("_", "-") in usage


# The others are given as `--sampling NAME=VALUE`.
FLAGS = {
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "repetition_window"),
    *("frequency_penalty", "presence_penalty", "seed", "top_n_sigma", "xtc_probability", "xtc_threshold"),
    *("dry_multiplier", "mirostat"),
}


def test_every_common_sampling_field_has_a_flag(bear: Bear) -> None:
    usage = bear("run", "--help").stdout
    assert {*inference.SamplingParams.DESCRIPTOR.fields_by_name} >= FLAGS
    assert [name for name in FLAGS if f"--{name.replace('_', '-')} " not in usage] == []
    assert "--sampling NAME=VALUE" in usage


def test_register_sends_an_absolute_path(bear: Bear, server: FakeServer) -> None:
    bear("register", "n", "n.gguf", "--alias", "other")
    request = server.last(models.RegisterModelRequest)
    assert request.path == str(Path.cwd() / "n.gguf")
    assert list(request.aliases) == ["other"]


def test_tokenize_shows_ids_and_pieces(bear: Bear) -> None:
    result = bear("tokenize", "demo", "hello")
    assert [line.split(maxsplit=1) for line in result.stdout.splitlines()] == [
        ["1", "' he'"],
        ["300", "'\\\\xc3'"],
    ]
    assert result.stderr == "2 tokens\n"


def test_tokenize_chat_sends_a_message(bear: Bear, server: FakeServer) -> None:
    bear("tokenize", "demo", "--chat", stdin="hello\n")
    request = server.last(inference.TokenizeRequest)
    assert request.chat.messages[0].content[0].text == "hello"
    assert not request.HasField("add_special")


@pytest.mark.parametrize(("service", "exit_code"), [("", 0), ("models/plain", 1)])
def test_health_exits_0_only_when_serving(bear: Bear, service: str, exit_code: int) -> None:
    result = bear("health", service)
    assert result.stdout in ("SERVING\n", "NOT_SERVING\n")
    assert result.exit_code == exit_code


def test_health_of_an_unknown_service_is_an_error(bear: Bear) -> None:
    result = bear("health", "models/nobody")
    assert result.exit_code == 1
    assert result.stdout == ""


def test_info_shows_the_server(bear: Bear) -> None:
    assert "version           0.1.0\n" in bear("info").stdout


def test_version_needs_no_server(bear: Bear) -> None:
    from bear_grpc import __version__

    assert bear("--version").stdout == f"{__version__}\n"
