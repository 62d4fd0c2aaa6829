"""Models that only llama.cpp can tell to be spoiled: loads and answers end with their cause."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Awaitable
from pathlib import Path

import grpc.aio
import psutil
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from tests.helpers.architectures import write_architecture
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.mutants import passing
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import Api

LOADS, LEAST_FORWARDS, SEED = 15, 3, 5
# A spoiled header may ask for nearly all memory that is free, which the system gives page by page.
TIMEOUT_S = 240.0
# What the contract has for a file that is no good, and for a worker that it ends.
CODES = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
}

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Outcome:
    """How loads of mutants ended, and the answers of those that were loaded."""

    loads: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    answers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


async def _ending(call: Awaitable[object]) -> str:
    """OK, or the reason of a status that the contract has for it."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await call
    except grpc.aio.AioRpcError as exc:
        status = rpc_status.from_call(exc)  # type: ignore[arg-type]
        assert status is not None, f"{exc.code()}: {exc.details()}"
        info = ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        assert exc.code() in CODES or info.reason == "ENGINE_START_FAILED", f"{info.reason}: {exc.details()}"
        return info.reason
    return "OK"


async def _try(api: Api, name: str, outcome: Outcome) -> None:
    loaded = await _ending(api.load(name))
    outcome.loads[loaded] += 1
    if loaded == "OK":
        outcome.answers[await _ending(api.once(name, max_tokens=4, ignore_eos=True))] += 1
        await _ending(api.unload(name))


async def chaos(folder: Path, loads: int, seed: int) -> Outcome:
    """Loads so many mutants; raises AssertionError if one ends badly, or leaves anything."""
    outcome = Outcome()
    victims = {
        "llama": write_tiny_llama(folder / "llama.gguf"),
        **{name: write_architecture(folder / f"{name}.gguf", name) for name in ("gemma2", "jamba")},
    }
    async with RunningServer(folder, environ={"BEAR_OFFLINE": "true"}) as server:
        await server.ready()
        sources = []
        for number, (name, path) in enumerate(victims.items()):
            await server.api.register(name, path)
            sources.append((name, path, passing(path, seed + number)))
        for count in range(loads):
            name, path, mutants = sources[count % len(sources)]
            new = path.with_suffix(".new")
            new.write_bytes(next(mutants))
            new.replace(path)  # the file that a worker may still have open stays whole
            await _try(server.api, name, outcome)
        children = psutil.Process(server.pid).children(recursive=True)
        assert children == [], children
    return outcome


async def test_spoiled_models_end_with_their_cause_and_leave_nothing(tmp_path: Path) -> None:
    outcome = await chaos(tmp_path, LOADS, SEED)
    assert outcome.answers.total() >= LEAST_FORWARDS
