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
        ("show", "demo", "--template"),
        ("estimate", "demo"),
        ("pull", "tiny"),
        ("pull", "tiny", "--cancel"),
        ("load", "demo"),
        ("unload", "demo"),
        ("stop", "demo"),
        ("prune", "--dry-run"),
        ("register", "n", "/models/n.gguf"),
        ("rm", "n", "m"),
        ("tokenize", "demo", "hello"),
        ("health",),
        ("info",),
        ("drain", "--wait"),
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


def test_load_gives_only_the_options_that_are_given(bear: Bear, server: FakeServer) -> None:
    result = bear(
        *("load", "demo", "--gpu-layers", "0", "--no-mmap", "--kv-cache-type", "q8_0", "--keep-alive", "5m")
    )
    assert server.last(models.LoadModelRequest).options == types.LoadOptions(
        gpu_layers=0, mmap=False, kv_cache_type=types.KV_CACHE_TYPE_Q8_0, keep_alive=Duration(seconds=300)
    )
    assert result.stdout == "bear-demo is ready after 500 ms: 4 sequences of up to 2048 tokens, 13.0 MiB\n"
    assert result.stderr == ""


@pytest.mark.parametrize(("given", "seconds"), [("-1", -1), ("forever", -1), ("0", 0), ("5m", 300)])
def test_load_and_run_take_a_keep_alive(bear: Bear, server: FakeServer, given: str, seconds: int) -> None:
    bear("load", "demo", "--keep-alive", given)
    loaded = server.last(models.LoadModelRequest).options
    bear("run", "demo", "Hi", "--keep-alive", given)
    asked = server.last(inference.GenerateRequest)
    for message in (loaded, asked):
        assert message.HasField("keep_alive")
        assert message.keep_alive.seconds == seconds


def test_load_may_pin(bear: Bear, server: FakeServer) -> None:
    bear("load", "demo", "--pinned")
    assert server.last(models.LoadModelRequest).options == types.LoadOptions(pinned=True)


@pytest.mark.parametrize("verb", ["stop", "unload"])
def test_stop_is_unload(bear: Bear, server: FakeServer, verb: str) -> None:
    result = bear(verb, "demo", "--drain-timeout", "0")
    assert server.last(models.UnloadModelRequest) == models.UnloadModelRequest(
        name="demo", drain_timeout=Duration()
    )
    assert result.stdout == "bear-demo is unloaded, 12.0 MiB are free again\n"


def test_every_load_option_has_a_flag(bear: Bear) -> None:
    usage = bear("load", "--help").stdout
    for field in types.LoadOptions.DESCRIPTOR.fields:
        assert "--" + field.name.replace("_", "-") + " " in usage


def test_every_load_option_that_takes_memory_has_a_flag_of_estimate(bear: Bear) -> None:
    usage = bear("estimate", "--help").stdout
    for name in {*types.LoadOptions.DESCRIPTOR.fields_by_name} - {"keep_alive", "pinned"}:
        assert "--" + name.replace("_", "-") + " " in usage


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


@pytest.mark.parametrize(("args", "told"), [((), [2]), (("--wait",), [2, 1, 0])], ids=["at once", "waiting"])
def test_drain_tells_what_is_left(
    bear: Bear, server: FakeServer, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], told: list[int]
) -> None:
    monkeypatch.setattr("bear_grpc.cli.drain._EVERY_S", 0.0)
    server.remaining = [2, 2, 1, 1]
    result = bear("drain", *args)
    words = {2: "2 requests are", 1: "1 request is", 0: "no requests are"}
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"the server takes no new work, {words[count]} left" for count in told
    ]


def test_version_needs_no_server(bear: Bear) -> None:
    from bear_grpc import __version__

    assert bear("--version").stdout == f"{__version__}\n"
