"""`bear estimate`: what it asks, the table of devices, and the exit code."""

from __future__ import annotations

import pytest

from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import types_pb2 as types
from tests.cli.conftest import Bear
from tests.client.fake_server import FakeServer
from tests.client.samples import MIB


def test_options_land_in_the_request(bear: Bear, server: FakeServer) -> None:
    bear("estimate", "owner/repo:Q4_K_M", "--context-length", "4096", "--gpu-layers", "0", "--no-mmap")
    assert server.last(models.EstimateMemoryRequest) == models.EstimateMemoryRequest(
        name="owner/repo:Q4_K_M",
        options=types.LoadOptions(context_length=4096, gpu_layers=0, mmap=False),
    )


def test_a_load_that_fits_exits_0(bear: Bear) -> None:
    result = bear("estimate", "demo")
    assert result.exit_code == 0
    header, device, _, options, fits = result.stdout.splitlines()
    assert header.split() == [*("DEVICE", "WEIGHTS", "KV", "COMPUTE", "OVERHEAD", "NEEDED", "FREE", "FITS")]
    assert device.split() == [
        *("CPU", "638", "MiB", "44.0", "MiB", "66.0", "MiB", "150", "MiB", "898", "MiB", "5.0", "GiB", "yes")
    ]
    assert options.split(maxsplit=1) == ["options", "context_length=2048, gpu_layers=0, keep_alive=300s"]
    assert fits.split() == ["fits", "yes"]


def lacking(*devices: str) -> models.EstimateMemoryResponse:
    full = [
        models.DeviceMemory(device=name, needed_bytes=300 * MIB, free_bytes=100 * MIB) for name in devices
    ]
    return models.EstimateMemoryResponse(devices=[models.DeviceMemory(device="CPU"), *full], fits=False)


@pytest.mark.parametrize("json", [(), ("--json",)])
def test_a_load_that_does_not_fit_exits_1(bear: Bear, server: FakeServer, json: tuple[str, ...]) -> None:
    server.estimate = lacking("CUDA0")
    result = bear("estimate", "demo", *json)
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout


def test_what_lacks_is_told_by_device(bear: Bear, server: FakeServer) -> None:
    server.estimate = lacking("CUDA0", "CUDA1")
    stdout = bear("estimate", "demo").stdout
    assert [line.split()[-1] for line in stdout.splitlines()[1:4]] == ["yes", "no", "no"]
    assert "no: 200 MiB more on CUDA0 and 200 MiB more on CUDA1 would be needed\n" in stdout
