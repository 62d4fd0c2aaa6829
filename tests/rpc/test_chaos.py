"""Clients that load, generate, leave, unload and kill at random: every call ends as the contract says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.processes import gone
from tests.helpers.rpc import WAIT_S, Api, ask, serving

MODELS = ("one", "two", "three")
ALLOWED = {
    "UNAVAILABLE MODEL_UNLOADED",
    "UNAVAILABLE WORKER_CRASHED",
    "UNAVAILABLE LOAD_COOLDOWN",  # after a worker that was killed while it loaded
    "ABORTED LOAD_CONFLICT",
    "FAILED_PRECONDITION MODEL_ALREADY_LOADED",
    "FAILED_PRECONDITION MODEL_NOT_LOADED",
    "INTERNAL ENGINE_START_FAILED",
    "DEADLINE_EXCEEDED",
    "DEADLINE_EXCEEDED DEADLINE_UNREACHABLE",
}


def name_of(error: grpc.RpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    reasons = []
    for detail in status.details if status is not None else []:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            reasons.append(info.reason)
    return " ".join([error.code().name, *reasons])  # type: ignore[attr-defined]


class Client:
    """One client with a random will of its own, repeatable as far as it goes."""

    def __init__(self, api: Api, seed: int) -> None:
        self._api = api
        self._random = random.Random(seed)
        self.ended: Counter[str] = Counter()

    async def run(self, count: int) -> None:
        will: list[tuple[Callable[[str], Awaitable[None]], int]] = [
            (self.generate, 8),
            (self.leave, 4),
            (self.be_late, 2),
            (self.tokenize, 2),
            (self.load, 2),
            (self.unload, 2),
            (self.kill, 1),
        ]
        acts, weights = zip(*will, strict=True)
        for _ in range(count):
            act = self._random.choices(acts, weights)[0]
            try:
                async with asyncio.timeout(WAIT_S):
                    await act(self._random.choice(MODELS))
                self.ended["OK"] += 1
            except grpc.RpcError as exc:
                self.ended[name_of(exc)] += 1

    def request(self, model: str) -> inference_pb.GenerateRequest:
        count = self._random.randrange(1, 200)
        return ask(model, "the bear", max_tokens=count, ignore_eos=True, temperature=1)

    async def generate(self, model: str) -> None:
        request = self.request(model)
        tokens = 0
        call = self._api.inference.Generate(request)
        last = None
        while (event := await call.read()) is not grpc.aio.EOF:
            assert last is None, "an event after completed"
            tokens += len(event.delta.tokens)
            last = event.completed if event.HasField("completed") else None
        assert last is not None
        assert last.usage.completion_token_count == request.stop.max_tokens

    async def leave(self, model: str) -> None:
        call = self._api.inference.Generate(self.request(model))
        for _ in range(self._random.randrange(5)):
            await call.read()
        call.cancel()

    async def be_late(self, model: str) -> None:
        request = self.request(model)
        call = self._api.inference.Generate(request, timeout=self._random.uniform(0.001, 0.1))
        while await call.read() is not grpc.aio.EOF:
            pass

    async def tokenize(self, model: str) -> None:
        await self._api.inference.Tokenize(inference_pb.TokenizeRequest(model=model, text="the bear"))

    async def load(self, model: str) -> None:
        await self._api.load(model, **self._random.choice([{}, {}, {"max_sequences": 2}]))

    async def unload(self, model: str) -> None:
        await self._api.unload(model, self._random.randrange(2))

    async def kill(self, model: str) -> None:
        pid = (await self._api.status(model)).worker_process_id
        number = self._random.choice([signal.SIGKILL, signal.SIGABRT])
        if pid:
            with contextlib.suppress(ProcessLookupError):  # it ended in the meantime
                os.kill(pid, number)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_random_clients_end_as_the_contract_says_and_leave_nothing_behind(
    tmp_path: Path, spawner: Spawner, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    before = {child.pid for child in psutil.Process().children()}
    async with serving(tmp_path, spawner, allow_path=[tmp_path]) as (_, api):
        for place, name in enumerate(MODELS):
            path = write_tiny_llama(tmp_path / f"{name}.gguf", seed=place, context_length=512)
            await api.register(name, path, load_options=pb.LoadOptions(threads=1, max_sequences=1 + place))
        clients = [Client(api, seed * 100 + number) for number in range(10)]
        await asyncio.gather(*(client.run(25) for client in clients))
        ended = sum((client.ended for client in clients), Counter[str]())
        assert set(ended) <= {"OK", *ALLOWED}, ended
        assert ended["OK"] > 50
        for name in MODELS:
            await api.load(name)
            assert (await api.once(name, max_tokens=3, ignore_eos=True)).usage.completion_token_count == 3
            status = await api.idle(name)
            assert (status.running_count, status.waiting_count) == (0, 0)
            await api.unload(name)
        for child in psutil.Process().children():
            if child.pid not in before:
                await gone(child.pid)
        assert await api.serving("") == "SERVING"
    tracebacks = [record.getMessage() for record in caplog.records if record.exc_info]
    assert tracebacks == []
    assert not [
        record for record in caplog.records if record.name == "asyncio" and record.levelno >= logging.ERROR
    ]
