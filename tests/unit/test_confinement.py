"""What a worker is granted, and what the server says of it."""

from __future__ import annotations

import logging

import pytest

from bear_grpc.executor.confinement import Confinement
from bear_grpc.protocol import Confined, Probe
from bear_grpc.types import LoadOptions, SandboxMode, SandboxState
from bear_grpc.worker import grants

ON = Confined(SandboxState.ON, "cpu", 7)
PARTIAL = Confined(SandboxState.PARTIAL, "cpu", 0, "Landlock: not there")


def test_nothing_is_known_before_the_first_worker():
    confinement = Confinement(SandboxMode.AUTO)
    assert (confinement.state, confinement.detail) == (SandboxState.OFF, "")


def test_a_sandbox_that_is_on_is_no_warning(caplog):
    confinement = Confinement(SandboxMode.AUTO)
    confinement.take(ON)
    assert confinement.state is SandboxState.ON
    assert confinement.detail == "profile cpu, Landlock ABI 7, seccomp"
    assert caplog.records == []


def test_less_than_that_is_warned_of_once(caplog):
    confinement = Confinement(SandboxMode.AUTO)
    confinement.take(PARTIAL)
    confinement.take(PARTIAL)
    assert (confinement.state, confinement.detail) == (SandboxState.PARTIAL, "Landlock: not there")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "Landlock: not there" in record.getMessage()


def test_all_parts_of_a_split_model_are_granted(tmp_path):
    names = [f"bear-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert grants.model_files(tmp_path / names[0]) == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("name", ["bear.gguf", "bear-00001-of-3.gguf", "bear-00001-of-00003.gguf.part"])
def test_a_model_of_one_file_is_granted_as_it_is(tmp_path, name):
    assert grants.model_files(tmp_path / name) == [str(tmp_path / name)]


def test_the_root_of_all_files_is_never_granted(monkeypatch):
    monkeypatch.setattr("sys.path", ["/", "", "/usr/.."])
    assert "/" not in grants.readable(Probe())


@pytest.mark.parametrize(
    ("devices", "layers", "profile"),
    [
        ([], None, grants.CPU),
        ([], 99, grants.CPU),
        (["/dev/kfd"], 0, grants.CPU),
        (["/dev/kfd"], None, grants.GPU),
        (["/dev/kfd"], -1, grants.GPU),
    ],
)
def test_the_looser_profile_is_for_layers_on_a_gpu(monkeypatch, devices, layers, profile):
    monkeypatch.setattr(grants, "gpu_devices", lambda: devices)
    frame = Probe(options=LoadOptions(gpu_layers=layers))
    assert grants.profile(frame) == profile
    assert set(devices) <= set(grants.usable(frame)) or profile == grants.CPU
    assert ("/opt" in grants.readable(frame)) == (profile == grants.GPU)
