"""Loading, unloading, registering and forgetting, and what each refuses."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.models.entry import ModelStatus
from bear_grpc.types import ModelState
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import (
    Api,
    Code,
    collect,
    eventually,
    fails,
    kinds,
    read_until,
    serving,
    stopped_load,
    stream_fails,
)
from tests.rpc.conftest import NewModel


async def ready(api: Api, name: str) -> bool:
    return await api.state(name) == "READY"


# Loading


async def here(api: Api) -> list[pb.Model]:
    """All models but those that a catalog knows and nobody has downloaded."""
    listed = (await api.models.ListModels(models_pb.ListModelsRequest())).models
    return [model for model in listed if not model.source.HasField("hub")]


async def test_a_second_load_with_the_same_or_unset_options_joins_the_first(
    api: Api, new_model: NewModel
) -> None:
    name = await new_model()
    first, pid = await stopped_load(api, name, context_length=512)
    others = [asyncio.ensure_future(api.load(name, **options)) for options in ({}, {"context_length": 512})]
    await api.state(name)  # answered after the two have arrived
    os.kill(pid, signal.SIGCONT)
    answers = [await first, *(await asyncio.gather(*others))]
    assert {answer.status.worker_process_id for answer in answers} == {pid}
    assert len({answer.load_seconds for answer in answers}) == 1


async def test_a_second_load_with_other_options_is_a_conflict(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    first, pid = await stopped_load(api, name, context_length=512)
    status = await fails(api.load(name, context_length=1024), Code.ABORTED, "LOAD_CONFLICT")
    assert status.retry is not None
    os.kill(pid, signal.SIGCONT)
    assert (await first).status.effective_options.context_length == 512


async def test_a_loaded_model_takes_the_same_or_unset_options(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    await api.load(name, context_length=512)
    for options in ({}, {"context_length": 512}, {"context_length": 512, "threads": 1, "max_sequences": 1}):
        again = await api.load(name, **options)
        assert again.load_seconds == 0
        assert again.status.effective_options.context_length == 512


async def test_a_loaded_model_refuses_other_options_and_names_them(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    await api.load(name, context_length=512)
    status = await fails(
        api.load(name, context_length=1024, max_sequences=2, threads=1),
        Code.FAILED_PRECONDITION,
        "MODEL_ALREADY_LOADED",
    )
    assert set(status.metadata["differing"].split(",")) == {"context_length", "max_sequences"}
    assert await api.state(name) == "READY"


async def test_a_caller_that_leaves_does_not_stop_the_load(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    call, pid = await stopped_load(api, name)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await api.state(name)
    os.kill(pid, signal.SIGCONT)
    await eventually(lambda: ready(api, name))
    assert (await api.status(name)).worker_process_id == pid


async def test_a_load_begun_at_the_moment_one_fails_can_be_joined(tmp_path: Path, spawner: Spawner) -> None:
    """The end of the failed load forgot the new one: who joined that got INTERNAL."""
    path = write_tiny_llama(tmp_path / "again.gguf")
    good = path.read_bytes()
    begun: list[asyncio.Future[Any]] = []
    async with serving(tmp_path, spawner) as (server, api):
        await api.register("again", path, load_options=pb.LoadOptions(threads=1))
        os.truncate(path, 100)

        def begin_again(status: ModelStatus) -> None:
            if status.state is ModelState.FAILED and not begun:
                path.write_bytes(good)
                begun.append(asyncio.ensure_future(server.manager.load("again")))

        server.shelf.feed.listen(begin_again)
        await fails(api.load("again"), Code.FAILED_PRECONDITION, "MODEL_FILE_INVALID")
        assert (await api.load("again")).status.state == pb.MODEL_STATE_READY
        await begun[0]


async def test_a_context_beyond_the_models_own_is_refused_by_name(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    status = await fails(api.load(name, context_length=4096), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["options.context_length"]
    await api.load(name)
    assert await api.state(name) == "READY"


@pytest.mark.parametrize("length", [1, 33, 200])
async def test_a_context_below_the_batch_size_generates(api: Api, new_model: NewModel, length: int) -> None:
    """llama.cpp makes the batch as small as the context; the engine went on with the larger one."""
    name = await new_model()
    loaded = await api.load(name, context_length=length)
    options = loaded.status.effective_options
    assert options.context_length == length
    answer = await api.once(name, token_ids=[1], ignore_eos=True, max_tokens=length - 1)
    assert answer.usage.completion_token_count == length - 1


async def test_a_generation_loads_what_is_not_loaded_and_tells_the_progress(
    api: Api, new_model: NewModel
) -> None:
    name = await new_model()
    events = await collect(api.generate(name, max_tokens=2, ignore_eos=True, queue_progress=True))
    order = list(dict.fromkeys(kinds(events)))
    assert order == ["model_progress", "started", "delta", "completed"]
    states = [event.model_progress.state for event in events if event.HasField("model_progress")]
    assert states[0] == pb.MODEL_STATE_LOADING
    assert await api.state(name) == "READY"


async def test_a_generation_that_may_not_load_is_refused(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    status = await fails(api.once(name, load_if_needed=False), Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED")
    assert status.precondition is not None
    assert [violation.subject for violation in status.precondition.violations] == [name]
    assert await api.state(name) == "AVAILABLE"


async def test_generations_at_once_share_one_load(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    answers = await asyncio.gather(*(api.once(name, max_tokens=1, temperature=0) for _ in range(5)))
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert (await api.status(name)).counters.finished_sequence_count == 5


async def test_a_loading_model_cannot_be_deleted(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    call, pid = await stopped_load(api, name)
    await fails(api.delete(name), Code.FAILED_PRECONDITION, "MODEL_IN_USE")
    os.kill(pid, signal.SIGCONT)
    await call


# Unloading


async def test_an_unload_while_loading_ends_the_load_and_the_worker(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    call, pid = await stopped_load(api, name)
    loading = asyncio.ensure_future(call)
    unloaded = await api.unload(name)
    assert unloaded.status.state == pb.MODEL_STATE_AVAILABLE
    await fails(loading, Code.UNAVAILABLE, "MODEL_UNLOADED")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await api.load(name)


async def test_an_unload_right_after_a_load_leaves_no_worker(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    for _ in range(5):
        load = asyncio.ensure_future(api.load(name))
        while await api.state(name) != "LOADING":
            pass
        await api.unload(name)
        await fails(load, Code.UNAVAILABLE, "MODEL_UNLOADED")
        assert (await api.status(name)).worker_process_id == 0
    assert (await api.once(name, max_tokens=1)).usage.completion_token_count == 1


async def test_an_unload_without_drain_time_cuts_running_and_waiting_streams(api: Api, steady: str) -> None:
    calls = [api.generate(steady, max_tokens=1900, ignore_eos=True, queue_progress=True) for _ in range(2)]
    await read_until(calls[0], "delta")
    await read_until(calls[1], "queued")
    unloaded = await api.unload(steady, 0)
    assert unloaded.cancelled_count == 2
    for call in calls:
        seen, status = await stream_fails(call, Code.UNAVAILABLE, "MODEL_UNLOADED")
        assert not any(event.HasField("completed") for event in seen)
        assert status.retry is not None


async def test_an_unload_lets_running_streams_finish_and_takes_no_new_ones(api: Api, steady: str) -> None:
    call = api.generate(steady, max_tokens=300, ignore_eos=True)
    await read_until(call, "delta")
    unload = asyncio.ensure_future(api.unload(steady))

    async def unloading() -> bool:
        return await api.state(steady) == "UNLOADING"

    await eventually(unloading)
    await fails(api.once(steady), Code.UNAVAILABLE, "MODEL_UNLOADED")
    await fails(api.load(steady), Code.ABORTED, "LOAD_CONFLICT")
    await fails(api.delete(steady), Code.FAILED_PRECONDITION, "MODEL_IN_USE")
    events = await collect(call)
    assert kinds(events)[-1] == "completed"
    assert events[-1].completed.usage.completion_token_count == 300
    assert (await unload).cancelled_count == 0


async def test_an_unload_ends_at_once_what_has_not_begun_and_waits_for_what_runs(
    api: Api, steady: str
) -> None:
    running = api.generate(steady, max_tokens=1900, ignore_eos=True)
    await read_until(running, "delta")
    waiting = [api.generate(steady, max_tokens=4) for _ in range(3)]

    async def queued() -> bool:
        return (await api.status(steady)).waiting_count == 3

    await eventually(queued)
    unload = asyncio.ensure_future(api.unload(steady, 3600))
    for call in waiting:
        seen, status = await stream_fails(call, Code.UNAVAILABLE, "MODEL_UNLOADED")
        assert seen == []
        assert status.retry is not None
        # Nothing but trailers: a client may try it elsewhere.
        assert not [key for key, _ in await call.initial_metadata()]
    assert (await api.status(steady)).running_count == 1
    assert not unload.done()
    assert kinds(await collect(running))[-1] == "completed"
    assert (await unload).cancelled_count == 3


async def test_an_unload_of_what_is_not_loaded_is_refused(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    await fails(api.unload(name), Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED")


async def test_two_unloads_at_once_are_one(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    await api.load(name)
    answers = await asyncio.gather(api.unload(name), api.unload(name))
    assert answers[0] == answers[1]
    assert answers[0].released_bytes > 0


async def test_a_worker_that_dies_while_its_streams_finish_is_unloaded_all_the_same(
    api: Api, steady: str
) -> None:
    call = api.generate(steady, max_tokens=1900, ignore_eos=True)
    await read_until(call, "delta")
    pid = (await api.status(steady)).worker_process_id
    unload = asyncio.ensure_future(api.unload(steady))

    async def unloading() -> bool:
        return await api.state(steady) == "UNLOADING"

    await eventually(unloading)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as caught:
        await collect(call)
    assert caught.value.code() is Code.UNAVAILABLE  # type: ignore[attr-defined]
    async with asyncio.timeout(10):
        assert (await unload).status.state == pb.MODEL_STATE_AVAILABLE
    assert (await api.once(steady, max_tokens=1)).usage.completion_token_count == 1


async def test_a_draining_server_refuses_new_work(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner) as (server, api):
        server.manager.refuse()
        for call in (api.once("bear-demo"), api.load("bear-demo"), api.generate("bear-demo").read()):
            status = await fails(call, Code.UNAVAILABLE, "DRAINING")
            assert status.retry is not None
        assert await api.state("bear-demo") == "AVAILABLE"


# Names and registrations


async def test_a_loaded_model_cannot_be_deleted(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    await api.load(name)
    await fails(api.delete(name), Code.FAILED_PRECONDITION, "MODEL_IN_USE")
    await api.unload(name)
    await api.delete(name)


async def test_the_embedded_model_cannot_be_deleted(api: Api, demo: str) -> None:
    status = await fails(api.delete(demo), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["name"]


async def test_an_unknown_model_is_not_found_everywhere_and_its_neighbours_are_named(
    api: Api, tiny: str
) -> None:
    for call in (
        api.load("tinny"),
        api.unload("tinny"),
        api.delete("tinny"),
        api.once("tinny"),
        api.status("tinny"),
        api.models.WatchModels(models_pb.WatchModelsRequest(names=["tinny"])).read(),
        api.generate("tinny", queue_progress=True).read(),
        api.generate("tinny").read(),
    ):
        status = await fails(call, Code.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "tiny" in status.metadata["nearest"].split(",")
        assert status.resource is not None
        assert status.resource.resource_name == "tinny"


async def test_a_taken_name_or_alias_is_refused(api: Api, tiny: str, tiny_file: Path) -> None:
    for name, aliases in ((tiny, []), ("bear-demo", []), ("other", [tiny]), ("other", ["bear-demo"])):
        status = await fails(
            api.register(name, tiny_file, aliases=aliases), Code.ALREADY_EXISTS, "MODEL_EXISTS"
        )
        assert status.resource is not None


async def test_two_registrations_of_a_name_at_once_make_one_model(
    api: Api, new_model: NewModel, tiny_file: Path
) -> None:
    calls = [api.register("contested", tiny_file) for _ in range(2)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    failed = [result for result in results if isinstance(result, grpc.RpcError)]
    assert [error.code() for error in failed] == [Code.ALREADY_EXISTS]  # type: ignore[attr-defined]
    await api.delete("contested")


async def test_a_registrations_own_values_are_used(api: Api, tiny_file: Path) -> None:
    model = await api.register(
        "own-values",
        tiny_file,
        aliases=["own"],
        defaults=models_pb.SamplingOverrides(temperature=0, top_k=5, max_tokens=3),
        load_options=pb.LoadOptions(threads=1, context_length=600),
    )
    assert (model.defaults.temperature, model.defaults.top_k, model.defaults.max_tokens) == (0, 5, 3)
    answer = await api.once("own", ignore_eos=True)
    assert answer.usage.completion_token_count == 3
    assert (answer.started.sampling.temperature, answer.started.sampling.top_k) == (0, 5)
    assert answer.started.model == "own-values"
    status = await api.status("own")
    assert status.effective_options.context_length == 600
    await api.unload("own")
    await api.delete("own-values")


async def test_the_sha256_of_a_registered_file_arrives(api: Api, new_model: NewModel, files: Path) -> None:
    name = await new_model(seed=3)
    expected = hashlib.sha256((files / f"{name}.gguf").read_bytes()).hexdigest()

    async def known() -> str:
        answer = await api.models.GetModel(models_pb.GetModelRequest(name=name))
        return answer.model.sha256

    assert await eventually(known) == expected
    assert (await api.once(name, max_tokens=0)).started.sha256 == expected


async def test_registrations_survive_a_restart(tmp_path: Path, spawner: Spawner) -> None:
    path = write_tiny_llama(tmp_path / "kept.gguf")
    async with serving(tmp_path, spawner) as (_, api):
        await api.register(
            "org/kept:q8",
            path,
            aliases=["keeper"],
            defaults=models_pb.SamplingOverrides(temperature=0.25),
            load_options=pb.LoadOptions(threads=1, context_length=128),
        )
        await api.register("forgotten", path)
        await api.delete("forgotten")

        async def hashed() -> str:
            return (await api.models.GetModel(models_pb.GetModelRequest(name="keeper"))).model.sha256

        sha256 = await eventually(hashed)
    async with serving(tmp_path, spawner) as (_, api):
        listed = await here(api)
        assert [model.name for model in listed] == ["bear-demo", "org/kept:q8"]
        kept = listed[1]
        assert (list(kept.aliases), kept.source.file.path) == (["keeper"], str(path))
        assert kept.defaults.temperature == 0.25
        assert (kept.load_options.threads, kept.load_options.context_length) == (1, 128)
        assert kept.sha256 == sha256
        await api.load("keeper")
        assert await api.state("keeper") == "READY"


async def test_a_registration_whose_file_is_gone_after_a_restart_is_absent_and_can_be_deleted(
    tmp_path: Path, spawner: Spawner
) -> None:
    """Deleting it ended INTERNAL: ABSENT had no way to ABSENT."""
    path = write_tiny_llama(tmp_path / "gone.gguf")
    async with serving(tmp_path, spawner) as (_, api):
        await api.register("gone", path)
    path.unlink()
    async with serving(tmp_path, spawner) as (_, api):
        assert await api.state("gone") == "ABSENT"
        await fails(api.load("gone"), Code.NOT_FOUND, "MODEL_FILE_NOT_FOUND")
    async with serving(tmp_path, spawner) as (_, api):
        await api.delete("gone")
        await fails(api.status("gone"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    async with serving(tmp_path, spawner) as (_, api):
        await fails(api.status("gone"), Code.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_registrations_that_are_none_are_left_out(tmp_path: Path, spawner: Spawner) -> None:
    folder = tmp_path / "models" / "registered"
    folder.mkdir(parents=True)
    outside = write_tiny_llama(tmp_path / "outside.gguf")
    texts = {
        "text": "no json",
        "list": "[]",
        "field": '{"name": "field", "path": "/x", "unknown": 1}',
        "type": '{"name": 5, "path": "/x"}',
        "taken": f'{{"name": "bear-demo", "path": "{outside}"}}',
        "outside": f'{{"name": "outside", "path": "{outside}"}}',
    }
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "folder.json").mkdir()
    async with serving(tmp_path, spawner, allow_path=[]) as (_, api):
        listed = await here(api)
        assert [model.name for model in listed] == ["bear-demo", "outside"]
        assert listed[0].source.HasField("embedded")
        # The roots are narrower now than when it was registered.
        await fails(api.load("outside"), Code.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
        assert (await api.once("bear-demo", max_tokens=1)).usage.completion_token_count == 1


async def test_metadata_comes_when_asked_for(api: Api, tiny: str) -> None:
    plain = await api.models.GetModel(models_pb.GetModelRequest(name=tiny))
    assert list(plain.metadata) == []
    asked = await api.models.GetModel(models_pb.GetModelRequest(name=tiny, include_metadata=True))
    found = {entry.key: entry for entry in asked.metadata}
    assert found["llama.block_count"].int_value == 1
    assert found["general.architecture"].string_value == "llama"
    assert found["tokenizer.ggml.add_bos_token"].bool_value
    assert found["llama.attention.layer_norm_rms_epsilon"].double_value == pytest.approx(1e-5)
    tokens = found["tokenizer.ggml.tokens"].array_value
    assert (tokens.element_type, tokens.element_count > 256) == ("string", True)


async def test_pages_hold_every_model_once_and_filters_apply(api: Api, tiny: str, demo: str) -> None:
    whole = [m.name for m in (await api.models.ListModels(models_pb.ListModelsRequest())).models]
    found, token = [], ""
    while True:
        page = await api.models.ListModels(models_pb.ListModelsRequest(page_size=1, page_token=token))
        found += [model.name for model in page.models]
        token = page.next_page_token
        if not token:
            break
        assert len(page.models) == 1
    assert found == whole == sorted(whole)
    ready = await api.models.ListModels(models_pb.ListModelsRequest(states=[pb.MODEL_STATE_READY]))
    assert {tiny, demo} <= {model.name for model in ready.models}
    assert all(model.status.state == pb.MODEL_STATE_READY for model in ready.models)


async def test_a_watch_of_all_models_sees_one_come_and_go(api: Api, new_model: NewModel) -> None:
    watch = api.models.WatchModels(models_pb.WatchModelsRequest())
    known = (await api.models.ListModels(models_pb.ListModelsRequest())).models
    snapshot = [(await watch.read()).status.name for _ in known]
    assert snapshot == [model.name for model in known]
    name = await new_model()
    await api.delete(name)
    states = []
    async with asyncio.timeout(10):
        while not states or states[-1] != pb.MODEL_STATE_ABSENT:
            status = (await watch.read()).status
            if status.name == name:
                states.append(status.state)
    assert states == [pb.MODEL_STATE_AVAILABLE, pb.MODEL_STATE_ABSENT]
    watch.cancel()
