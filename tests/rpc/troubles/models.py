"""Models that are not there, not as they should be, or in a state that refuses the call."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from typing import Any

from bear_grpc.v1 import model_service_pb2 as models_pb
from tests.helpers.ggufs import spans, write_tiny_llama
from tests.helpers.rpc import StatusDetails, collect

from .bench import FILE, PULLED, Bench, answers, pull, told_to_wait

NOT_A_NUMBER = b"\x00\x00\xc0\x7f"  # of F32


async def model_not_found(bench: Bench) -> list[StatusDetails]:
    told = await bench.refused(bench.api.once("bear-dem"), "MODEL_NOT_FOUND")
    await answers(bench.api, told.metadata["nearest"])
    return [told]


async def model_file_not_found(bench: Bench) -> list[StatusDetails]:
    path = bench.folder / "a.gguf"
    with bench.hub() as hub:
        async with bench.pulling(hub, auto_pull="catalog") as api:
            gone = await bench.refused(api.register("a", path), "MODEL_FILE_NOT_FOUND")
            write_tiny_llama(path)
            await api.register("a", path)
            await answers(api, "a")
            absent = await bench.refused(api.once(PULLED), "MODEL_FILE_NOT_FOUND")
            assert (gone.metadata, absent.metadata) == ({"path": str(path)}, {"model": PULLED})
            assert absent.resource is not None and absent.resource.resource_name == PULLED
            await collect(pull(api))
            await answers(api, PULLED)
    return [gone, absent]


async def model_not_loaded(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    told = await bench.refused(bench.api.once(name, load_if_needed=False), "MODEL_NOT_LOADED")
    await bench.api.load(name)
    await answers(bench.api, name, load_if_needed=False)
    return [told]


async def model_already_loaded(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    await bench.api.load(name, context_length=512)
    told = await bench.refused(bench.api.load(name, context_length=1024), "MODEL_ALREADY_LOADED")
    await bench.api.load(name)
    await bench.api.load(name, pinned=False)
    await bench.api.unload(name)
    assert (await bench.api.load(name, context_length=1024)).status.effective_options.context_length == 1024
    return [told]


async def model_in_use(bench: Bench) -> list[StatusDetails]:
    name, gate = await bench.model(), threading.Event()
    await bench.api.load(name)
    loaded = await bench.refused(bench.api.delete(name), "MODEL_IN_USE")
    await bench.api.unload(name)
    await bench.api.delete(name)
    with bench.hub() as hub:
        hub.fail(FILE, slow=gate)
        async with bench.pulling(hub) as api:
            download = pull(api)
            await download.read()
            pulled = await bench.refused(api.delete(PULLED), "MODEL_IN_USE")
            await api.models.CancelPull(models_pb.CancelPullRequest(name=PULLED))
            gate.set()
            await bench.refused(api.status(PULLED), "MODEL_NOT_FOUND")
    return [loaded, pulled]


async def model_exists(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    path = bench.files / f"{name}.gguf"
    told = await bench.refused(bench.api.register(name, path), "MODEL_EXISTS")
    await bench.refused(bench.api.register("phi-2", path), "MODEL_EXISTS")
    await bench.api.delete(name)
    await bench.api.register(name, path)
    return [told]


async def model_file_invalid(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    path = bench.files / f"{name}.gguf"
    good = path.read_bytes()
    os.truncate(path, 100)
    told = await bench.refused(bench.api.load(name), "MODEL_FILE_INVALID")
    assert told.metadata["offset_bytes"]
    path.write_bytes(good)
    await answers(bench.api, name)
    return [told]


def spoil(path: Path) -> None:
    """Its weights are no numbers from now on, the header is as it was."""
    data = bytearray(path.read_bytes())
    (output,) = [span for span in spans(path) if (span.kind, span.owner) == ("data", "output.weight")]
    data[output.start : output.end] = NOT_A_NUMBER * (output.size // 4)
    path.write_bytes(data)


async def model_output_invalid(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    path = bench.files / f"{name}.gguf"
    good = path.read_bytes()
    spoil(path)
    told = await bench.refused(bench.api.once(name), "MODEL_OUTPUT_INVALID")
    await bench.api.unload(name)
    path.write_bytes(good)
    await answers(bench.api, name)
    return [told]


async def held_load(bench: Bench, name: str, **options: Any) -> tuple[asyncio.Future[Any], int]:
    """A load whose worker stands still before it is ready: the call, and the worker's id."""
    call = asyncio.ensure_future(bench.api.load(name, **options))
    pid = await bench.api.loading(name)
    os.kill(pid, signal.SIGSTOP)
    assert await bench.api.state(name) == "LOADING"
    return call, pid


async def load_conflict(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    first, pid = await held_load(bench, name, context_length=512)
    told = await bench.refused(bench.api.load(name, context_length=1024), "LOAD_CONFLICT")
    joined = asyncio.ensure_future(bench.api.load(name, context_length=512))
    await bench.api.state(name)  # answered after that has arrived
    os.kill(pid, signal.SIGCONT)
    assert (await first).status.worker_process_id == (await joined).status.worker_process_id == pid
    await told_to_wait(told)
    await bench.refused(bench.api.load(name, context_length=1024), "MODEL_ALREADY_LOADED")
    return [told]


async def failed_load(bench: Bench, name: str) -> StatusDetails:
    """The worker is killed while it loads."""
    call, pid = await held_load(bench, name)
    os.kill(pid, signal.SIGKILL)
    return await bench.refused(call, "ENGINE_START_FAILED")


async def engine_start_failed(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    told = await failed_load(bench, name)
    await bench.refused(bench.api.once(name), "LOAD_COOLDOWN")
    await bench.api.load(name, context_length=128)
    return [told]


async def load_cooldown(bench: Bench) -> list[StatusDetails]:
    name = await bench.model()
    failed = await failed_load(bench, name)
    told = await bench.refused(bench.api.once(name), "LOAD_COOLDOWN")
    assert failed.message in told.message
    assert (await bench.api.status(name)).message == failed.message
    await bench.api.load(name)
    await answers(bench.api, name)
    return [told]


async def insufficient_memory(bench: Bench) -> list[StatusDetails]:
    name = await bench.model(bench.steady_file)
    huge = bench.api.load(name, max_sequences=256, kv_cache_tokens=2**26, kv_unified=True)
    told = await bench.refused(huge, "INSUFFICIENT_MEMORY")
    assert told.metadata["model"] == name
    assert int(told.metadata["needed_bytes"]) > int(told.metadata["free_bytes"])
    await bench.api.load(name, max_sequences=1)
    return [told]
