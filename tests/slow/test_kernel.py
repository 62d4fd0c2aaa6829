"""What only the kernel can do to a worker: end it for its memory, or not end it. Needs control groups."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers import faulty_worker
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import collect, eventually, read_until, serving, text_of

ROOT = Path(__file__).parents[2]
GROUPS = Path("/sys/fs/cgroup")
SPARE_BYTES = 32 << 20
HONEST: dict[str, Any] = {"token_ids": [5, 6, 7], "temperature": 0, "ignore_eos": True, "max_tokens": 1500}

pytestmark = [pytest.mark.slow, pytest.mark.model]


class Group:
    """A control group (version 1) for one process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, name: str, value: object) -> None:
        (self._path / name).write_text(str(value))

    def read(self, name: str) -> str:
        return (self._path / name).read_text()


@contextlib.contextmanager
def group(controller: str) -> Iterator[Group]:
    """Skips the test where no group can be made."""
    path = GROUPS / controller / f"bear-{uuid.uuid4().hex}"
    if not (GROUPS / controller / "cgroup.procs").exists():
        pytest.skip(f"no control groups of version 1 for {controller}")
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group can be made: {exc}")
    try:
        yield Group(path)
    finally:
        path.rmdir()


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    thread = Spawner()
    yield thread
    thread.close()
    thread.join()


@pytest.fixture
def faulty() -> Iterator[Spawner]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        thread = Spawner(module="tests.helpers.faulty_worker")
        yield thread
        thread.close()
        thread.join()


async def test_a_worker_that_the_kernel_ends_for_its_memory_makes_nobody_a_suspect(
    faulty: Spawner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", context_length=2048)
    async with serving(tmp_path, faulty) as (_, api):
        await api.register("m", path, load_options=pb.LoadOptions(threads=1, max_sequences=4))
        await api.load("m", flash_attention=False)
        whole = text_of(await collect(api.generate("m", **HONEST)))
        streams = [api.generate("m", **HONEST) for _ in range(2)]
        seen = [await read_until(stream, "delta") for stream in streams]
        with group("memory") as limited:
            # More than twice: that many native faults would make suspects of all of them.
            for _ in range(3):
                worker = psutil.Process((await api.status("m")).worker_process_id)
                limited.write("cgroup.procs", worker.pid)
                limited.write("memory.limit_in_bytes", SPARE_BYTES)
                hungry = await api.once("m", token_ids=faulty_worker.GROWS, max_tokens=1, ignore_eos=True)
                assert hungry.usage.completion_token_count == 1
                assert not worker.is_running()
        for stream, before in zip(streams, seen, strict=True):
            assert text_of(before + await collect(stream)) == whole
        assert "the worker ended: SIGKILL" in caplog.text
        assert await api.state("m") == "READY"


async def test_a_worker_that_does_not_end_is_told_after_its_unload(
    spawner: Spawner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that hangs in a driver: a frozen process takes its SIGKILL when it is thawed."""
    path = write_tiny_llama(tmp_path / "m.gguf", context_length=2048)
    async with serving(tmp_path, spawner) as (_, api):
        await api.register("m", path, load_options=pb.LoadOptions(threads=1))
        pid = (await api.load("m")).status.worker_process_id
        with group("freezer") as frozen:
            frozen.write("cgroup.procs", pid)
            frozen.write("freezer.state", "FROZEN")
            try:
                unloaded = await api.unload("m", 0)
                status = await api.status("m")
                assert status.state == pb.MODEL_STATE_AVAILABLE
                assert status.worker_process_id == pid
                assert f"process {pid} does not end" in status.message
                assert status.memory.process_bytes == status.memory.overhead_bytes > 1 << 20
                assert f"process {pid} does not end" in caplog.text
                # The room is not there, but the model can be loaded beside it.
                again = (await api.load("m")).status
                assert again.worker_process_id not in (0, pid)
                assert (await api.once("m", max_tokens=1)).usage.completion_token_count == 1
            finally:
                frozen.write("freezer.state", "THAWED")

            async def has_ended() -> bool:
                status = await api.status("m")
                return not psutil.pid_exists(pid) and status.worker_process_id != pid

            await eventually(has_ended)
        assert unloaded.released_bytes < 64 << 20
