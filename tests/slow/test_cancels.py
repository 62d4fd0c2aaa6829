"""Clients that leave at any moment take nothing with them and leave nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path

import psutil
import pytest

from bear_grpc.access.usage import FILE as USAGE
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import Api, eventually

CANCELS, SEED = 250, 13
CONCURRENCY, SLOTS = 32, 8
GROWTH_BYTES = 5_000_000
WARM_UP_PART = 0.1

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How many clients left in time, and by how many bytes the server grew after the first tenth."""

    left: int
    ended: int
    grown_bytes: int


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of the server's process."""

    memory_bytes: int
    files: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> Usage:
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


async def _leave(api: Api, prompt: list[int], after_s: float) -> bool:
    """Whether the client was gone before the answer was whole."""
    call = api.generate("left", token_ids=prompt, max_tokens=64, ignore_eos=True)
    try:
        async with asyncio.timeout(after_s):
            async for _ in call:
                pass
    except TimeoutError:
        call.cancel()
        return True
    return False


async def chaos(folder: Path, cancels: int, seed: int) -> Outcome:
    """So many clients that leave; raises AssertionError if anything of them is left."""
    draw = random.Random(seed)
    path = write_tiny_llama(folder / "left.gguf", n_embd=64, n_layer=2, n_ff=128, context_length=512)
    async with RunningServer(folder, environ={"BEAR_OFFLINE": "true"}) as server:
        await server.ready()
        await server.api.register("left", path)
        await server.api.load("left", threads=1, max_sequences=SLOTS)
        process = psutil.Process(server.pid)
        gate = asyncio.Semaphore(CONCURRENCY)

        async def counts_usage() -> bool:
            """Its files are opened with the first that is written, by a thread of its own, and stay so."""
            names = {Path(file.path).name for file in process.open_files()}
            return {USAGE, f"{USAGE}-wal", f"{USAGE}-shm"} <= names

        async def one() -> bool:
            async with gate:
                # Before the first step as likely as in the middle of an answer.
                prompt = [draw.randrange(3, 250) for _ in range(draw.randint(1, 200))]
                return await _leave(server.api, prompt, 10 ** draw.uniform(-3, 0))

        async def some(count: int) -> tuple[int, Usage]:
            left = sum(await asyncio.gather(*(one() for _ in range(count))))
            await server.api.idle("left")
            await eventually(counts_usage)
            return left, Usage.of(process)

        warm_up = round(cancels * WARM_UP_PART)
        first, before = await some(warm_up)
        rest, after = await some(cancels - warm_up)
        status = await server.api.idle("left")
        held = status.kv_cache_used_token_count - status.kv_cache_idle_token_count
        assert held == 0, f"{held} tokens are held in the KV cache"
        failed = status.counters.failed_sequence_count
        assert failed == 0, f"{failed} sequences failed"
        assert (after.files, after.threads) == (before.files, before.threads), (
            f"{before} before, {after} after"
        )
        assert not server.errors(), server.errors()[:3]
    grown = after.memory_bytes - before.memory_bytes
    assert grown < GROWTH_BYTES, f"the server grew by {grown} bytes"
    return Outcome(first + rest, cancels - first - rest, grown)


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(tmp_path: Path) -> None:
    outcome = await chaos(tmp_path, CANCELS, SEED)
    assert outcome.left > CANCELS // 4
