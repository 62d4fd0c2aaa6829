"""A wall clock that jumps by hours under a server and its workers: nobody is ended for it."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import WAIT_S, ask, collect, read_until

SOURCE = Path(__file__).parents[1] / "helpers" / "clock_shift.c"
HOURS_S = 5 * 3600
BEAT_LIMIT_S = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None, reason="needs ld.so and a C compiler"
    ),
]


class WallClock:
    """The wall clock of processes that are started with `environ`."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock_shift.so", folder / "shift"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        self._file.write_bytes(bytes(8))
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(self._file)}

    def move_to(self, seconds: int) -> None:
        """So far from the true time; at once, in all of them."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("<q", seconds))


@pytest.fixture
def wall_clock(tmp_path: Path) -> Iterator[WallClock]:
    clock = WallClock(tmp_path)
    yield clock
    clock.move_to(0)


def hours_off(status: pb.ModelStatus) -> int:
    """How far the server's wall clock was from the true one when the model came into its state."""
    true = datetime.datetime.now(datetime.UTC)
    since = status.since_time.ToDatetime(datetime.UTC)
    return round((since - true).total_seconds() / 3600)


@pytest.mark.parametrize("shift_s", [HOURS_S, -HOURS_S], ids=["forwards", "backwards"])
async def test_a_wall_clock_that_jumps_ends_nothing(
    tmp_path: Path, steady_file: Path, wall_clock: WallClock, shift_s: int
) -> None:
    environ = {**wall_clock.environ, "BEAR_HEARTBEAT_TIMEOUT_S": str(BEAT_LIMIT_S)}
    async with RunningServer(tmp_path, environ=environ) as server:
        api = (await server.ready()).api
        await api.register("steady", steady_file, load_options=pb.LoadOptions(threads=1))
        options = pb.LoadOptions(threads=1)
        options.keep_alive.FromSeconds(600)
        await api.register("idle", steady_file, load_options=options)
        pids = {name: (await api.load(name)).status.worker_process_id for name in ("steady", "idle")}
        request = ask("steady", max_tokens=600, ignore_eos=True, temperature=0)
        running = api.inference.Generate(request, timeout=WAIT_S)
        seen = await read_until(running, "delta")
        wall_clock.move_to(shift_s)
        under_another_clock = api.inference.Generate(request, timeout=WAIT_S)
        seen += await collect(running)
        assert len(await collect(under_another_clock)) > 1
        assert seen[-1].completed.usage.completion_token_count == 600
        # Longer than a worker may be silent.
        await asyncio.sleep(BEAT_LIMIT_S + 1)
        for name, pid in pids.items():
            status = await api.status(name)
            assert (status.state, status.worker_process_id) == (pb.MODEL_STATE_READY, pid)
        answer = await api.once("idle", max_tokens=3, ignore_eos=True)
        assert answer.usage.completion_token_count == 3
        # The proof that the clock was another one.
        await api.unload("idle", 0)
        assert hours_off(await api.status("idle")) == shift_s // 3600
        assert server.errors() == []
        server.terminate()
        assert await server.ended() == 0
