"""Requests that are wrong, that the state of their model refuses, and that cost too much."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers import faulty_worker
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, StatusDetails, ask, collect, kinds, read_until

from .bench import LONG, ONE, Bench, answers, told_to_wait

# A reader whose window is small: the server's writes block after some 25 kB.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)]


async def invalid_field(bench: Bench) -> list[StatusDetails]:
    told = await bench.refused(bench.api.once("bear-demo", top_k=-1), "INVALID_FIELD")
    assert told.fields == ["request.sampling.top_k"]
    await answers(bench.api, "bear-demo", top_k=1)
    return [told]


async def context_length_exceeded(bench: Bench) -> list[StatusDetails]:
    name, prompt = await bench.model(), [5] * 200
    await bench.api.load(name, context_length=128)
    told = await bench.refused(bench.api.once(name, token_ids=prompt), "CONTEXT_LENGTH_EXCEEDED")
    await answers(bench.api, name, token_ids=prompt, overflow_policy="truncate_left")
    await bench.api.unload(name)
    await bench.api.load(name, context_length=256)
    await answers(bench.api, name, token_ids=prompt)
    return [told]


async def grammar_invalid(bench: Bench) -> list[StatusDetails]:
    unknown = await bench.refused(bench.api.once("bear-demo", lark="start: missing"), "GRAMMAR_INVALID")
    schema = {"type": "array", "uniqueItems": True}
    not_held = await bench.refused(bench.api.once("bear-demo", json_schema=schema), "GRAMMAR_INVALID")
    await answers(bench.api, "bear-demo", lark='start: "bear"', max_tokens=8)
    return [unknown, not_held]


async def request_id_in_use(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    running = bench.api.generate(name, request_id="job-17", **LONG)
    await read_until(running, "started")
    told = await bench.refused(bench.api.once(name, request_id="job-17"), "REQUEST_ID_IN_USE")
    await collect(running)
    await answers(bench.api, name, request_id="job-17")
    return [told]


async def constraint_dead_end(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    needed = await bench.refused(bench.api.once(name, lark='start: "a" <[1]> "b"'), "CONSTRAINT_DEAD_END")
    await answers(bench.api, name, lark='start: "a" "b"', max_tokens=8)
    # The constraint leaves nothing but the end, and that may not come yet.
    optional = 'start: "a" <[1]>?'
    early = await bench.refused(bench.api.once(name, lark=optional, min_tokens=8), "CONSTRAINT_DEAD_END")
    assert (await bench.api.once(name, lark=optional)).choices[0].text == "a"
    return [needed, early]


def alternatives(count: int) -> str:
    """A grammar with so many of them after its first character."""
    letters = string.ascii_lowercase
    found = itertools.islice(itertools.product(letters, repeat=3), count)
    rules = "".join(f'{letter}: "{letter}"\n' for letter in letters)
    return f'start: "0" one\none: {"|".join(map(" ".join, found))}\n{rules}'


async def constraint_too_costly(bench: Bench) -> list[StatusDetails]:
    call = bench.api.once("bear-demo", lark=alternatives(10_100))
    told = await bench.refused(call, "CONSTRAINT_TOO_COSTLY")
    await answers(bench.api, "bear-demo", lark=alternatives(100), max_tokens=8)
    return [told]


async def deadline_unreachable(bench: Bench) -> list[StatusDetails]:
    name, prompt = await bench.model(bench.steady_file), [7] * 1900
    await bench.api.load(name)
    call = bench.api.inference.Generate(ask(name, token_ids=prompt, max_tokens=1), timeout=0.3)
    told = await bench.cut(call, "DEADLINE_UNREACHABLE")
    assert float(told.metadata["predicted_seconds"]) > 0.3
    events = await collect(
        bench.api.inference.Generate(ask(name, token_ids=prompt, max_tokens=1), timeout=60)
    )
    assert kinds(events)[-1] == "completed"
    return [told, await slot_in_vain(bench)]


async def slot_in_vain(bench: Bench) -> StatusDetails:
    """What a call is told that waits for a slot longer than the server lets it."""
    async with paced_model(bench, max_request_s=1.0) as api:
        running = api.inference.Generate(ask("m", max_tokens=1000, ignore_eos=True), timeout=60)
        await read_until(running, "delta")
        told = await bench.refused(api.once("m"), "DEADLINE_UNREACHABLE")
        running.cancel()
        await answers(api, "m")
    return told


async def slow_consumer(bench: Bench) -> list[StatusDetails]:
    path = write_tiny_llama(bench.folder / "model.gguf", context_length=2048)
    # Long ids make long messages: few of them fill the window.
    options: dict[str, Any] = {**LONG, "return_token_ids": True, "request_id": "x" * 120}
    async with bench.serving(stall_timeout_s=0.3) as api, Api(api.target, SMALL_WINDOW) as lazy:
        await api.register("m", path, load_options=ONE)
        call = lazy.generate("m", **options)
        await read_until(call, "delta")
        # Somebody else has the slot now.
        await answers(api, "m")
        told = await bench.cut(call, "SLOW_CONSUMER")
        assert (await collect(lazy.generate("m", **options)))[-1].HasField("completed")
    return [told]


@asynccontextmanager
async def paced_model(bench: Bench, **settings: Any) -> AsyncIterator[Api]:
    """A server with the loaded model `m`: one sequence at a time, each token takes 20 ms."""
    paced = bench.start(module="tests.helpers.paced_worker")
    path = write_tiny_llama(bench.folder / "model.gguf", context_length=2048)
    async with bench.serving(paced, **settings) as api:
        await api.register("m", path, load_options=ONE)
        await api.load("m")
        yield api


async def queue_full(bench: Bench) -> list[StatusDetails]:
    async with paced_model(bench, max_waiting_requests=3) as api:
        running = api.generate("m", max_tokens=1000, ignore_eos=True)
        await read_until(running, "delta")
        waiting = [api.generate("m", max_tokens=2, ignore_eos=True, queue_progress=True) for _ in range(3)]
        for call in waiting:
            await read_until(call, "queued")
        told = await bench.refused(api.once("m", max_tokens=2), "QUEUE_FULL")
        running.cancel()
        await told_to_wait(told)
        await answers(api, "m")
        for call in waiting:
            assert kinds(await collect(call))[-1] == "completed"
    return [told]


async def faulty_model(bench: Bench, api: Api) -> None:
    """Registers and loads `m`, which computes several sequences at once."""
    path = write_tiny_llama(bench.folder / "model.gguf", context_length=2048)
    await api.register("m", path, load_options=pb.LoadOptions(threads=1, max_sequences=4))
    await api.load("m")


def faulty(bench: Bench) -> Spawner:
    return bench.start(module="tests.helpers.faulty_worker")


async def request_quarantined(bench: Bench) -> list[StatusDetails]:
    async with bench.serving(faulty(bench)) as api:
        await faulty_model(bench, api)
        call = api.once("m", token_ids=faulty_worker.ABORTS, max_tokens=4)
        told = await bench.refused(call, "REQUEST_QUARANTINED")
        await answers(api, "m", token_ids=[5, 6, 7])
    assert "native code said: poison.c:7: poisoned" in bench.log.text
    return [told]


async def worker_crashed(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    running = bench.api.generate(name, fail_on_restart=True, **LONG)
    await read_until(running, "delta")
    os.kill((await bench.api.status(name)).worker_process_id, signal.SIGKILL)
    told = await bench.cut(running, "WORKER_CRASHED")
    await told_to_wait(told)
    await answers(bench.api, name)
    return [told]


async def model_unloaded(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    running = bench.api.generate(name, **LONG)
    await read_until(running, "delta")
    unload = asyncio.ensure_future(bench.api.unload(name, 0))
    told = await bench.cut(running, "MODEL_UNLOADED")
    await unload
    await told_to_wait(told)
    await answers(bench.api, name)
    return [told]
