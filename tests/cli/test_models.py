"""`bear list`, `ps`, `rm` and `prune`: what is here, what runs, and what goes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from bear_grpc.cli import words
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import types_pb2 as types
from tests.cli.conftest import Bear
from tests.client import samples
from tests.client.fake_server import FakeServer, Refusal


def names(stdout: str) -> list[str]:
    return [line.split()[0] for line in stdout.splitlines()[1:]]


def test_list_shows_every_model_in_a_line(bear: Bear) -> None:
    header, *lines = bear("list").stdout.splitlines()
    assert header.split() == ["NAME", "SIZE", "QUANT", "STATE", "CONTEXT"]
    assert [line.split() for line in lines] == [
        ["bear-demo", "10.0", "MiB", "Q8_0", "READY", "4096"],
        ["plain", "AVAILABLE"],
    ]


def test_list_shows_what_is_here_and_what_is_coming(bear: Bear, server: FakeServer) -> None:
    server.models = [samples.DEMO, samples.TINY, samples.COMING]
    result = bear("list")
    assert names(result.stdout) == ["bear-demo", "coming"]
    assert "ABSENT (downloading 50%)" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("option", ["--all", "-a"])
def test_list_all_shows_the_catalog_too(bear: Bear, server: FakeServer, option: str) -> None:
    server.models = [samples.DEMO, samples.TINY]
    result = bear("list", option)
    assert names(result.stdout) == ["bear-demo", "tiny"]
    assert result.stdout.splitlines()[2].split() == ["tiny", "640", "MiB", "Q4_K_M", "ABSENT", "2048"]
    assert len(json.loads(bear("list", option, "--json").stdout)["models"]) == 2
    assert len(json.loads(bear("list", "--json").stdout)["models"]) == 1


def test_an_empty_list_says_that_models_can_be_pulled(bear: Bear, server: FakeServer) -> None:
    server.models = [samples.TINY]
    result = bear("list")
    assert names(result.stdout) == []
    assert result.stderr == "no model is here yet; `bear list --all` shows 1 that can be pulled\n"
    server.models = []
    assert bear("list").stderr == ""


def test_a_long_name_is_not_cut_where_no_person_looks(bear: Bear, server: FakeServer) -> None:
    name = "owner/" + "x" * 120
    server.models = [types.Model(name=name, status=types.ModelStatus(state=types.MODEL_STATE_AVAILABLE))]
    assert name in bear("list").stdout


def test_a_state_of_a_later_server_is_its_number() -> None:
    status = types.ModelStatus()
    status.MergeFromString(b"\x10\x63")  # field 2, 99
    assert words.state(status) == "99"


def test_ps_shows_the_loaded_models_and_what_is_left_of_others(bear: Bear, server: FakeServer) -> None:
    server.models = [
        types.Model(name=types.ModelState.Name(state), status=types.ModelStatus(state=state))
        for state in types.ModelState.values()
    ]
    loaded = [f"MODEL_STATE_{n}" for n in ("LOADING", "READY", "UNLOADING")]
    assert names(bear("ps").stdout) == [*loaded, "(total)"]
    memory = types.MemoryLedger(process_bytes=3 << 20)
    status = types.ModelStatus(state=types.MODEL_STATE_AVAILABLE, worker_process_id=7, memory=memory)
    server.models = [types.Model(name="left", status=status), *server.models]
    assert bear("ps").stdout.splitlines()[1].split()[:4] == ["left", "AVAILABLE", "3.0", "MiB"]


def test_ps_tells_what_a_loaded_model_does(bear: Bear, server: FakeServer) -> None:
    header, line = bear("ps").stdout.splitlines()
    assert header.split() == [
        *("NAME", "STATE", "MEMORY", "RUNNING", "WAITING", "KV", "IDLE", "UNTIL", "PINNED")
    ]
    assert line.split() == ["bear-demo", "READY", "13.0", "MiB", "1", "0", "10%", "1%", "forever", "no"]


def test_ps_memory_tells_what_it_is_used_for(bear: Bear, server: FakeServer) -> None:
    model = types.Model()
    model.CopyFrom(samples.DEMO)
    model.status.memory.process_bytes, model.status.memory.overhead_bytes = 17 << 20, 4 << 20
    server.models = [model]
    header, line = bear("ps", "--memory").stdout.splitlines()
    assert header.split()[2:7] == ["MEMORY", "WEIGHTS", "CACHE", "COMPUTE", "OVERHEAD"]
    assert line.split()[2:12] == [
        *("17.0", "MiB", "10.0", "MiB", "2.0", "MiB", "1.0", "MiB", "4.0", "MiB"),
    ]


def test_ps_adds_up_several_models_in_a_row_that_no_model_can_be(bear: Bear, server: FakeServer) -> None:
    server.models = [samples.DEMO, samples.DEMO]
    assert names(bear("ps").stdout) == ["bear-demo", "bear-demo", "(total)"]
    total = bear("ps", "--memory", "--counters").stdout.splitlines()[-1]
    assert total.split() == [
        *("(total)", "26.0", "MiB", "20.0", "MiB", "4.0", "MiB", "2.0", "MiB", "0", "B", "2", "0"),
    ]
    assert len(json.loads(bear("ps", "--json").stdout)["models"]) == 2


def test_ps_counters_tell_what_was_done(bear: Bear) -> None:
    header, line = bear("ps", "--counters").stdout.splitlines()
    assert header.split()[-5:] == ["STEPS", "PREFILLED", "CACHED", "DECODED", "PREEMPTED"]
    assert line.split()[-5:] == ["0", "33", "22", "44", "5"]


def test_ps_tells_a_model_that_is_pinned(bear: Bear, server: FakeServer) -> None:
    status = types.ModelStatus(
        state=types.MODEL_STATE_READY, effective_options=types.LoadOptions(pinned=True)
    )
    server.models = [types.Model(name="m", status=status)]
    assert bear("ps").stdout.splitlines()[1].split()[-1] == "yes"


def staying(
    expires_in_s: float | None = None, keep_alive_s: int | None = None, running: int = 0
) -> types.ModelStatus:
    status = types.ModelStatus(running_count=running)
    if expires_in_s is not None:
        status.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=expires_in_s))
    if keep_alive_s is not None:
        status.effective_options.keep_alive.CopyFrom(Duration(seconds=keep_alive_s))
    return status


@pytest.mark.parametrize(
    ("stays", "text"),
    [
        ({"expires_in_s": 270.0}, "4 minutes from now"),
        ({"expires_in_s": -5}, "now"),
        ({}, "forever"),
        ({"keep_alive_s": -1, "running": 1}, "forever"),
        ({"keep_alive_s": 300, "running": 1}, "in use"),
        ({"keep_alive_s": 0}, "its next use"),
    ],
)
def test_until(stays: dict[str, Any], text: str) -> None:
    assert words.until(staying(**stays)) == text


def test_rm_removes_one_after_the_other(bear: Bear, server: FakeServer) -> None:
    result = bear("rm", "a", "b")
    removed = [request.name for request in server.requests if isinstance(request, models.DeleteModelRequest)]
    assert removed == ["a", "b"]
    assert result.stdout.splitlines() == [
        "a is removed, 1.0 MiB are free again",
        "b is removed, 1.0 MiB are free again",
    ]


def test_rm_goes_on_after_one_that_cannot_be_removed(bear: Bear, server: FakeServer) -> None:
    server.in_use = {"b"}
    result = bear("rm", "a", "b", "c", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"released_bytes": str(2 << 20)}
    assert result.stderr.startswith("error: in use [MODEL_IN_USE]\n")


def test_rm_without_a_server_is_one_error(bear: Bear, server: FakeServer) -> None:
    server.refusal = Refusal(grpc.StatusCode.UNAVAILABLE, "gone")
    result = bear("rm", "a", "b")
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 1


def test_rm_of_nothing_is_bad_usage(bear: Bear) -> None:
    assert bear("rm").exit_code == 2


@pytest.mark.parametrize(("args", "words"), [((), "are free again"), (("--dry-run",), "would be free again")])
def test_prune_tells_each_file_and_the_sum(
    bear: Bear, server: FakeServer, args: tuple[str, ...], words: str
) -> None:
    header, *lines, total = bear("prune", *args).stdout.splitlines()
    assert server.last(models.PruneModelsRequest).dry_run is bool(args)
    assert header.split() == ["FILE", "SIZE"]
    assert [line.split() for line in lines] == [
        ["partial/0123.part", "300", "MiB"],
        ["blobs/4567", "100", "MiB"],
    ]
    assert total == f"2 files, 400 MiB {words}"


def test_prune_with_nothing_to_remove_says_so(bear: Bear, server: FakeServer) -> None:
    server.prunable = []
    assert bear("prune").stdout == "there is nothing to remove\n"
