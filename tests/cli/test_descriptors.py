"""The descriptor set is whole: a pool that knows nothing else takes it, and it has every service."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from bear_grpc.v1 import inference_service_pb2, model_service_pb2, server_service_pb2
from tests.cli.conftest import Bear

OURS = {
    name
    for module in (inference_service_pb2, model_service_pb2, server_service_pb2)
    for name in (service.full_name for service in module.DESCRIPTOR.services_by_name.values())
}


def read(data: bytes) -> descriptor_pool.DescriptorPool:
    """Adds file after file: one that comes before its import is refused."""
    pool = descriptor_pool.DescriptorPool()
    for file in FileDescriptorSet.FromString(data).file:
        pool.Add(file)  # type: ignore[no-untyped-call]
        pool.FindFileByName(file.name)
    return pool


def test_set_is_whole_and_has_every_service(bear: Bear, tmp_path: Path) -> None:
    file = tmp_path / "bear.binpb"
    done = bear("descriptors", str(file))
    assert (done.exit_code, done.stdout) == (0, "")
    pool = read(file.read_bytes())
    for name in (*OURS, "grpc.health.v1.Health"):
        assert pool.FindServiceByName(name).methods
    for name in ("google.rpc.ErrorInfo", "google.rpc.RetryInfo", "google.rpc.Status"):
        assert pool.FindMessageTypeByName(name)
    assert len(OURS) == 3


def test_stdout_takes_the_same_bytes(bear: Bear, tmp_path: Path) -> None:
    file = tmp_path / "bear.binpb"
    bear("descriptors", str(file))
    assert bear("descriptors").stdout_bytes == file.read_bytes()


def test_file_that_cannot_be_written_is_named(bear: Bear, tmp_path: Path) -> None:
    done = bear("descriptors", str(tmp_path / "no" / "bear.binpb"))
    assert done.exit_code == 2
    assert "No such file" in done.stderr
