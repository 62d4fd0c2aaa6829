"""The whole life of a model, from a file on the disk to nothing, in one go."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, Code, collect, fails, kinds, text_of
from tests.rpc.conftest import TEMPLATE

NAME = "pipeline/tiny:f32"
ONE = pb.LoadOptions(threads=1, max_sequences=1)


async def test_a_model_from_register_to_delete_does_all_it_should(api: Api, files: Path) -> None:
    path = write_tiny_llama(files / "pipeline.gguf", chat_template=TEMPLATE, context_length=512)
    model = await api.register(NAME, path, load_options=ONE, aliases=["pipe"])
    assert (model.architecture, model.context_length, model.license) == ("llama", 512, "apache-2.0")
    assert (model.source.file.path, model.size_bytes) == (str(path), path.stat().st_size)
    assert pb.MODEL_CAPABILITY_CHAT in model.capabilities
    assert model.status.state == pb.MODEL_STATE_AVAILABLE
    listed = await api.models.ListModels(models_pb.ListModelsRequest())
    assert NAME in [found.name for found in listed.models]

    watch = api.models.WatchModels(models_pb.WatchModelsRequest(names=["pipe"]))
    assert (await watch.read()).status.state == pb.MODEL_STATE_AVAILABLE
    # With one layout of the weights asked for they are loaded once, and the stages come in order.
    loaded = await api.load("pipe", context_length=256, repack=False)
    assert loaded.load_seconds > 0
    seen: list[pb.ModelStatus] = []
    while not seen or seen[-1].state != pb.MODEL_STATE_READY:
        seen.append((await watch.read()).status)
    watch.cancel()
    assert {status.state for status in seen[:-1]} == {pb.MODEL_STATE_LOADING}
    stages = [status.load_progress.stage for status in seen[:-1]]
    # Measuring has no place of its own.
    begun = [stage for stage in dict.fromkeys(stages) if stage != pb.LOAD_STAGE_MEASURING]
    assert begun == sorted(begun)
    assert stages[0] == pb.LOAD_STAGE_UNSPECIFIED
    assert len(set(stages)) > 1
    fractions = [s.load_progress.fraction for s in seen if s.load_progress.stage == pb.LOAD_STAGE_WEIGHTS]
    assert all(0 <= fraction <= 1 for fraction in fractions)
    options = loaded.status.effective_options
    assert (options.context_length, options.threads, options.max_sequences) == (256, 1, 1)

    events = await collect(
        api.generate(NAME, "the bear", temperature=0, max_tokens=20, ignore_eos=True, return_token_ids=True)
    )
    assert kinds(events) == ["started", "delta", "completed"]
    assert len({event.request_id for event in events}) == 1
    started, completed = events[0].started, events[-1].completed
    assert (started.model, started.max_tokens) == (NAME, 20)
    tokens = [token for event in events for token in event.delta.tokens]
    assert started.prompt_token_count == completed.usage.prompt_token_count
    assert completed.usage.completion_token_count == len(tokens) == 20
    assert b"".join(token.piece for token in tokens).decode(errors="replace") == text_of(events)

    once = await api.once(NAME, "the bear", temperature=0, max_tokens=20, ignore_eos=True)
    assert once.choices[0].text == text_of(events)
    assert once.usage.prompt_token_count == completed.usage.prompt_token_count
    assert once.usage.completion_token_count == completed.usage.completion_token_count
    assert list(once.choices[0].tokens) == []

    status = await api.status(NAME)
    assert status.memory.weights_bytes > 0
    assert status.memory.kv_cache_bytes > 0
    assert status.memory.process_bytes > status.memory.weights_bytes
    assert status.memory.compute_bytes > 0
    known = status.memory.weights_bytes + status.memory.kv_cache_bytes + status.memory.compute_bytes
    assert status.memory.overhead_bytes == max(0, status.memory.process_bytes - known)
    assert (status.counters.submitted_sequence_count, status.counters.finished_sequence_count) == (2, 2)
    assert status.counters.decode_token_count == 40
    pid = status.worker_process_id
    assert psutil.pid_exists(pid)

    unloaded = await api.unload(NAME)
    assert unloaded.released_bytes > 0
    assert unloaded.cancelled_count == 0
    assert unloaded.status.state == pb.MODEL_STATE_AVAILABLE
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    after = await api.status(NAME)
    assert (after.worker_process_id, after.memory.process_bytes) == (0, 0)

    await api.delete(NAME)
    gone = await fails(api.status(NAME), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert gone.resource is not None
    assert gone.resource.resource_name == NAME
    assert path.exists()
