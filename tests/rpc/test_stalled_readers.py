"""Clients that stop reading for good: what they hold is given back, and others are served meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import WAIT_S, Api, Code, eventually, read_until, serving, stream_fails

STALL_S = 0.3
# The server's writes block after some 25 kB of a connection's.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)]
LONG_ID = "x" * 100
CONNECTIONS, STREAMS = 20, 10
MAX_GROWTH_BYTES = 32 * 2**20


def lazy_call(api: Api, request_id: str) -> Any:
    """An answer that fills the window."""
    options = {"max_tokens": 1900, "ignore_eos": True, "return_token_ids": True}
    return api.generate("tiny", "hello", request_id=request_id, **options)  # type: ignore[arg-type]


async def test_a_reader_that_never_comes_back_loses_all_but_its_status(
    tmp_path: Path, spawner: Spawner, tiny_file: Path
) -> None:
    settings = {"allow_path": [tiny_file.parent], "stall_timeout_s": STALL_S}
    async with serving(tmp_path, spawner, **settings) as (server, api):
        await api.register("tiny", tiny_file, load_options=pb.LoadOptions(threads=1, max_sequences=2))
        await api.load("tiny")
        async with Api(api.target, SMALL_WINDOW) as lazy:
            call = lazy_call(lazy, LONG_ID)
            await read_until(call, "delta")

            async def ended() -> bool:
                return server.manager.remaining == 0

            await eventually(ended)
            # Its id can be used again, and nothing waits for it.
            answer = await api.once("tiny", max_tokens=1, request_id=LONG_ID)
            assert answer.usage.completion_token_count == 1
            # What was sent is still there to be read, and then its ending.
            seen, status = await stream_fails(call, Code.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
            assert seen
            assert float(status.metadata["stalled_seconds"]) == STALL_S


@pytest.mark.slow
async def test_200_stalled_readers_cost_no_memory_and_no_slot(tmp_path: Path, tiny_file: Path) -> None:
    args = ("--allow-path", str(tiny_file.parent))
    async with RunningServer(tmp_path, *args, environ={"BEAR_STALL_TIMEOUT_S": "0.5"}) as server:
        api = (await server.ready()).api
        await api.register("tiny", tiny_file, load_options=pb.LoadOptions(threads=1, max_sequences=32))
        worker = (await api.load("tiny")).status.worker_process_id
        await api.once("tiny", max_tokens=400, ignore_eos=True)
        processes = [psutil.Process(pid) for pid in (server.pid, worker)]

        def held() -> int:
            return sum(process.memory_info().rss for process in processes)

        before = held()
        most = 0
        async with AsyncExitStack() as stack:
            lazy = [
                await stack.enter_async_context(Api(api.target, SMALL_WINDOW)) for _ in range(CONNECTIONS)
            ]
            calls = [
                lazy_call(each, f"{LONG_ID}{place}.{stream}")
                for place, each in enumerate(lazy)
                for stream in range(STREAMS)
            ]

            async def all_lost() -> bool:
                nonlocal most
                most = max(most, held())
                counters = (await api.status("tiny")).counters
                ended = counters.failed_sequence_count + counters.cancelled_sequence_count
                # A reader that reads is served all the time.
                served = await api.once("tiny", max_tokens=2, ignore_eos=True)
                assert served.usage.completion_token_count == 2
                return ended == len(calls)

            await eventually(all_lost, 3 * WAIT_S)
            assert most - before < MAX_GROWTH_BYTES
            assert (await api.idle("tiny")).running_count == 0
            for call in calls:
                call.cancel()
        async with asyncio.timeout(WAIT_S):
            assert (await api.once("tiny", max_tokens=2, ignore_eos=True)).usage.completion_token_count == 2
        # gRPC tells of each status that found nobody.
        assert [line for line in server.errors() if " grpc." not in line] == []
