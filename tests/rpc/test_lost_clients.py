"""Clients that are gone without a word: no FIN, no RST, only silence. Keepalive finds them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.server import Server
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.proxies import Proxy
from tests.helpers.rpc import WAIT_S, Api, collect, eventually, kinds, read_until, serving

pytestmark = pytest.mark.model

KEEPALIVE_S = 0.3
# So that nothing else ends what a lost client has.
NEVER_S = 3600.0

# A client that tells of its first text, and would read on.
READER = """
import sys
from bear_grpc.client import Client
with Client(sys.argv[1]) as client:
    for event in client.generate("steady", "hello", max_tokens=1900, ignore_eos=True):
        if event.HasField("delta"):
            print("begun", flush=True)
"""


@pytest.fixture
async def watched(tmp_path: Path, spawner: Spawner, steady_file: Path) -> AsyncIterator[tuple[Server, Api]]:
    """A server that asks silent clients soon, with one slot of the slow model; and a client that stays."""
    settings = {
        "listen": ["127.0.0.1:0"],
        "allow_path": [steady_file.parent],
        "keepalive_time_s": KEEPALIVE_S,
        "keepalive_timeout_s": KEEPALIVE_S,
        "stall_timeout_s": NEVER_S,
        "max_request_s": 0.0,
    }
    async with serving(tmp_path, spawner, **settings) as (server, api):
        await api.register("steady", steady_file, load_options=pb.LoadOptions(threads=1, max_sequences=1))
        await api.load("steady")
        yield server, api


async def none_left(server: Server) -> None:
    """Waits until no call is under way."""

    async def gone() -> bool:
        return server.manager.remaining == 0

    await eventually(gone)


async def test_the_slot_of_a_client_whose_network_is_cut_goes_to_the_next(
    watched: tuple[Server, Api],
) -> None:
    server, api = watched
    async with Proxy(server.addresses[0]) as proxy, Api(proxy.address) as lost:
        running = lost.generate("steady", max_tokens=1900, ignore_eos=True)
        await read_until(running, "delta")
        proxy.cut()
        # It is as silent as the lost one while it waits, but answers when it is asked.
        answer = await api.once("steady", max_tokens=2, ignore_eos=True)
        assert answer.usage.completion_token_count == 2
        await none_left(server)
        assert (await api.status("steady")).counters.cancelled_sequence_count == 1
        # Nobody has told the client either.
        assert not running.done()


async def test_a_lost_client_that_waits_leaves_the_queue(watched: tuple[Server, Api]) -> None:
    server, api = watched
    async with Proxy(server.addresses[0]) as proxy, Api(proxy.address) as lost:
        running = api.generate("steady", max_tokens=1900, ignore_eos=True)
        await read_until(running, "delta")
        waiting = lost.generate("steady", max_tokens=4, queue_progress=True)
        await read_until(waiting, "queued")
        proxy.cut()

        async def left() -> pb.EngineCounters | None:
            counters = (await api.status("steady")).counters
            return counters if counters.cancelled_sequence_count else None

        counters = await eventually(left)
        assert counters is not None
        assert (counters.finished_sequence_count, counters.cancelled_sequence_count) == (0, 1)
        # The other client does not read, but it answers: its call is the one that is left.
        assert server.manager.remaining == 1
        running.cancel()
        await none_left(server)


async def test_a_client_process_that_stands_still_frees_its_slot(watched: tuple[Server, Api]) -> None:
    server, api = watched
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", READER, server.addresses[0], stdout=asyncio.subprocess.PIPE
    )
    try:
        assert client.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert await client.stdout.readline() == b"begun\n"
        os.kill(client.pid, signal.SIGSTOP)
        await none_left(server)
        assert (await api.idle("steady")).counters.cancelled_sequence_count == 1
    finally:
        client.kill()
        await client.wait()


async def test_a_silent_client_that_answers_is_left_alone(watched: tuple[Server, Api]) -> None:
    """While its worker stands still it has nothing to say but that it is there, several times."""
    server, api = watched
    async with Proxy(server.addresses[0]) as proxy, Api(proxy.address) as patient:
        call = patient.generate("steady", max_tokens=200, ignore_eos=True)
        await read_until(call, "delta")
        worker = (await api.status("steady")).worker_process_id
        os.kill(worker, signal.SIGSTOP)
        try:
            answered = proxy.pieces_sent + 8

            async def asked_often() -> bool:
                return proxy.pieces_sent >= answered

            await eventually(asked_often)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert kinds(await collect(call))[-1] == "completed"
