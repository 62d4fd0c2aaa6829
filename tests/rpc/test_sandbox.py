"""The sandbox as clients and operators see it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bear_grpc.executor.probe import probe
from bear_grpc.executor.spawner import Spawner
from bear_grpc.types import SandboxMode
from bear_grpc.v1 import server_service_pb2 as pb
from bear_grpc.v1.types_pb2 import LoadOptions
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import serving

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@pytest.fixture
def start() -> Iterator[Callable[[SandboxMode], Spawner]]:
    made: list[Spawner] = []

    def new(mode: SandboxMode) -> Spawner:
        made.append(Spawner(mode))
        return made[-1]

    yield new
    for spawner in made:
        spawner.close()
        spawner.join()


@pytest.mark.parametrize("options", [{}, {"mmap": False}, {"mlock": True}], ids=["mapped", "read", "locked"])
async def test_split_model_of_links_is_served_in_the_whole_sandbox(
    tmp_path, start, caplog, options: dict[str, bool]
):
    blobs, folder = tmp_path / "blobs", tmp_path / "models"
    blobs.mkdir()
    folder.mkdir()
    write_tiny_llama(blobs / "tiny.gguf", part_tensors=5)
    parts = sorted(blobs.iterdir())
    assert len(parts) > 1
    for number, part in enumerate(parts):
        (folder / part.name).symlink_to(part.rename(blobs / f"{number:064}"))
    spawner = start(SandboxMode.REQUIRE)
    assert (await probe(spawner, folder / parts[0].name)).info is not None
    # A registration is of the file behind a link.
    (folder / parts[0].name).unlink()
    (blobs / f"{0:064}").rename(folder / parts[0].name)
    async with serving(tmp_path, spawner) as (_, api):
        await api.register("split", folder / parts[0].name, load_options=LoadOptions(**options))
        await api.load("split")
        events = [event async for event in api.generate("split", max_tokens=8, ignore_eos=True)]
        assert events[-1].completed.usage.completion_token_count == 8
        info = await api.server.GetServerInfo(pb.GetServerInfoRequest())
    assert info.sandbox == pb.SANDBOX_STATE_ON
    assert info.sandbox_detail.startswith("profile cpu, Landlock ABI ")
    assert "CONFINED" not in caplog.text


async def test_a_server_without_a_sandbox_says_so_loudly_and_once(tmp_path, start, caplog):
    async with serving(tmp_path, start(SandboxMode.OFF)) as (_, api):
        first = await api.server.GetServerInfo(pb.GetServerInfoRequest())
        await api.server.GetServerInfo(pb.GetServerInfoRequest())
    assert first.sandbox == pb.SANDBOX_STATE_OFF
    assert first.sandbox_detail == "the setting `sandbox` is off"
    [record] = [record for record in caplog.records if "CONFINED" in record.getMessage()]
    assert record.levelno == logging.WARNING


async def test_a_worker_has_no_new_privileges_and_leaves_no_core_file(tmp_path, start):
    write_tiny_llama(tmp_path / "tiny.gguf")
    async with serving(tmp_path, start(SandboxMode.REQUIRE)) as (_, api):
        await api.register("tiny", tmp_path / "tiny.gguf")
        process = Path("/proc") / str((await api.load("tiny")).status.worker_process_id)
        # Of every thread, those that llama.cpp has started included.
        statuses = await asyncio.to_thread(lambda: [p.read_text() for p in process.glob("task/*/status")])
        limits = await asyncio.to_thread((process / "limits").read_text)
    assert len(statuses) >= 3
    for status in statuses:
        fields = dict(line.split(":\t", 1) for line in status.splitlines())
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
        assert int(fields["CapEff"], 16) & ~(1 << 2 | 1 << 14) == 0
    [core] = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    assert core.split()[4:6] == ["0", "0"]
