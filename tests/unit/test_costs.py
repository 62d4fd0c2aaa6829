"""Step times on disk: found again for the same file on the same machine, and only there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bear_grpc.models import costs
from bear_grpc.models.costs import CostStore, is_sound
from bear_grpc.types import CostTable, StepCost

TABLES = [
    CostTable(False, 2, [StepCost(1, 0.027), StepCost(16, 0.13)]),
    CostTable(True, 2, [StepCost(1, 0.024)]),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "costs"


def test_store_gives_back_what_was_written(folder, model):
    CostStore(folder).write(model, TABLES)
    assert CostStore(folder).read(model) == TABLES


def test_store_write_replaces_and_leaves_one_file(folder, model):
    store = CostStore(folder)
    store.write(model, TABLES)
    store.write(model, TABLES[:1])
    assert store.read(model) == TABLES[:1]
    assert [file.suffix for file in folder.iterdir()] == [".json"]


def test_store_of_nothing_gives_nothing(folder, model):
    assert CostStore(folder).read(model) == []
    assert CostStore(folder).read(model.with_name("gone")) == []


def test_store_write_for_a_file_that_is_gone_does_nothing(folder, model):
    CostStore(folder).write(model.with_name("gone"), TABLES)
    assert not folder.exists()


def test_store_knows_a_file_by_any_path_to_it(folder, model):
    CostStore(folder).write(model, TABLES)
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    assert CostStore(folder).read(link) == TABLES


def test_store_knows_nothing_of_another_machine(folder, model):
    CostStore(folder, "arm64, other, 8 cores").write(model, TABLES)
    assert CostStore(folder, "arm64, other, 4 cores").read(model) == []


def test_store_knows_nothing_of_another_release_of_llama_cpp(folder, model, monkeypatch):
    CostStore(folder).write(model, TABLES)
    monkeypatch.setattr(costs.importlib.metadata, "version", lambda name: "0.0.1")
    assert CostStore(folder).read(model) == []


@pytest.mark.parametrize("change", ["time", "size"])
def test_store_knows_nothing_of_a_file_that_has_changed(folder, model, change):
    CostStore(folder).write(model, TABLES)
    before = model.stat()
    if change == "size":
        model.write_bytes(b"GGUF.")
    shift = 1 if change == "time" else 0
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns + shift))
    assert CostStore(folder).read(model) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"tables": "x"}',
        b"\xff",
        b'{"path":"","machine":"","binding":"","tables":'
        b'[{"repack":true,"threads":2,"costs":[{"tokens":1,"seconds":-1}]}]}',
    ],
)
def test_store_leaves_a_bad_file_out_and_tells_it(folder, model, content, caplog):
    store = CostStore(folder)
    store.write(model, TABLES)
    [file] = folder.iterdir()
    file.write_bytes(content)
    assert store.read(model) == []
    assert file.name in caplog.text
    store.write(model, TABLES)
    assert store.read(model) == TABLES


def test_store_that_cannot_be_written_is_told_and_no_error(model, caplog):
    CostStore(model / "costs").write(model, TABLES)
    assert "are not kept" in caplog.text


@pytest.mark.parametrize(
    "table",
    [
        CostTable(True, 0, [StepCost(1, 0.5)]),
        CostTable(True, 2, [StepCost(0, 0.5)]),
        CostTable(True, 2, [StepCost(2, 0.5), StepCost(1, 0.5)]),
        CostTable(True, 2, [StepCost(1, 0.5), StepCost(1, 0.5)]),
        CostTable(True, 2, [StepCost(1, 0.0)]),
        CostTable(True, 2, [StepCost(1, float("nan"))]),
        CostTable(True, 2, [StepCost(1, float("inf"))]),
    ],
)
def test_table_of_what_are_no_times_is_not_sound(table):
    assert not is_sound(table)


def test_table_may_be_empty():
    assert is_sound(CostTable(True, 2, []))


def test_machine_names_its_processor_and_cores():
    assert costs.describe_machine().endswith(f"{os.cpu_count()} cores")
