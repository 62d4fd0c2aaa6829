"""Two servers are restarted, one after the other, behind a client that goes round those that serve."""

from __future__ import annotations

import asyncio
import functools
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bear_grpc.client import AsyncClient
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import WAIT_S, eventually

pytestmark = pytest.mark.slow

# More than the model's slots take at a time: some always wait.
CLIENTS = 12
ANSWERS_BETWEEN = 30


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


async def finished(server: RunningServer) -> int:
    """How many answers it has given since its start."""
    return (await server.api.status("bear-demo")).counters.finished_sequence_count


class Load:
    """Callers that ask again and again, and what they got."""

    def __init__(self, target: str) -> None:
        self.client = AsyncClient(target)
        self.answers = 0
        self.failed: list[str] = []
        self._more = asyncio.Event()
        self._stopping = False

    async def run(self, caller: int) -> None:
        while not self._stopping:
            try:
                tokens = await (self._stream() if caller % 2 else self._once())
            except Exception as error:
                self.failed.append(repr(error))
            else:
                if tokens != 24:
                    self.failed.append(f"{tokens} tokens")
            self.answers += 1
            self._more.set()

    async def several(self) -> None:
        """Waits for answers that were asked for from here on."""
        wanted = self.answers + ANSWERS_BETWEEN
        async with asyncio.timeout(WAIT_S):
            while self.answers < wanted:
                self._more.clear()
                await self._more.wait()

    def stop(self) -> None:
        self._stopping = True

    async def _once(self) -> int:
        answer = await self.client.generate_once("bear-demo", "What is GGUF?", max_tokens=24, ignore_eos=True)
        return answer.usage.completion_token_count

    async def _stream(self) -> int:
        count = 0
        async for event in self.client.generate("bear-demo", "What is GGUF?", max_tokens=24, ignore_eos=True):
            if event.HasField("completed"):
                count = event.completed.usage.completion_token_count
        return count


async def test_a_rolling_restart_loses_no_request(tmp_path: Path) -> None:
    ports = free_ports(2)

    def server(place: int) -> RunningServer:
        args = ("--listen", f"127.0.0.1:{ports[place]}", "--load", "bear-demo")
        return RunningServer(tmp_path, *args, name=f"{place}", environ={"BEAR_WITHDRAWAL_S": "0.5"})

    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(server(place)) for place in range(2)]
        for each in running:
            await each.ready()
        load = Load("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports))
        callers = [asyncio.create_task(load.run(caller)) for caller in range(CLIENTS)]
        await load.several()
        served = []
        for place in range(2):
            served.append(await finished(running[place]))
            running[place].terminate()
            assert await running[place].ended() == 0
            assert running[place].errors() == []
            await load.several()
            running[place] = await stack.enter_async_context(server(place))
            await running[place].ready()
            await eventually(functools.partial(finished, running[place]))
        load.stop()
        await asyncio.wait(callers, timeout=WAIT_S)
        assert all(caller.done() for caller in callers)
        await load.client.close()
    assert load.failed == []
    # Both had work: none of them was only a spare.
    assert min(served) > 0
