"""Faults of the machine around a server: it answers with a cause, and goes on when they are over."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import psutil

from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import Code, eventually, fails

FILES = 80
"""A server and a loaded model take about half of them."""


def shell(before: str, after: str = "") -> tuple[str, ...]:
    """Runs a command in the shell's way."""
    return "/bin/sh", "-c", f'{before} exec "$@" {after}', "sh"


async def test_a_log_that_nobody_can_write_costs_no_answer(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf")
    async with RunningServer(tmp_path, wrapper=shell("", "2>/dev/full")) as server:
        await server.ready()
        await server.api.register("model", path)
        await server.api.load("model")
        worker = psutil.Process((await server.api.status("model")).worker_process_id)
        worker.kill()  # an error in the log, if it could be written
        await eventually(lambda: _has_ended(worker))
        answer = await server.api.once("model", max_tokens=3, ignore_eos=True)
        assert answer.usage.completion_token_count == 3
        server.terminate()
        assert await server.ended() == 0


async def _has_ended(process: psutil.Process) -> bool:
    return not process.is_running()


async def test_without_free_files_a_load_fails_with_its_cause_and_works_later(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf")
    async with RunningServer(tmp_path, wrapper=shell(f"ulimit -n {FILES};")) as server:
        await server.ready()
        await server.api.register("first", path)
        await server.api.register("second", path)
        await server.api.load("first")
        with contextlib.ExitStack() as held:
            for _ in range(FILES):
                client = held.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(server.target.removeprefix("unix:"))
            await eventually(lambda: _has_files(server, FILES - 2))
            failed = await fails(server.api.load("second"), Code.INTERNAL, "ENGINE_START_FAILED")
            assert "Too many open files" in failed.message
            answer = await server.api.once("first", max_tokens=3, ignore_eos=True)
            assert answer.usage.completion_token_count == 3
        await eventually(lambda: _has_files(server, FILES // 2, most=True))
        await server.api.load("second")
        assert await server.api.state("second") == "READY"


async def _has_files(server: RunningServer, count: int, *, most: bool = False) -> bool:
    found = psutil.Process(server.pid).num_fds()
    return found <= count if most else found >= count
