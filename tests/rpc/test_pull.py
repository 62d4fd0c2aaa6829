"""Downloads over the API: a stand-in hub, a real server, a real worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.hub import ALWAYS, StandInHub
from tests.helpers.rpc import WAIT_S, Api, Code, collect, eventually, fails, kinds, serving, stream_fails

REPO, FILE = "owner/repo", "tiny.Q4_K_M.gguf"
NAME, LONG = f"{REPO}:Q4_K_M", f"{REPO}/{FILE}"

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("pull") / FILE, context_length=512)


@pytest.fixture(scope="module")
def size(model: Path) -> int:
    return model.stat().st_size


@pytest.fixture
def hub(model: Path) -> Iterator[StandInHub]:
    with StandInHub() as stand_in:
        stand_in.add(REPO, FILE, model)
        yield stand_in


@pytest.fixture
async def api(tmp_path: Path, spawner: Spawner, hub: StandInHub) -> AsyncIterator[Api]:
    async with pulling(tmp_path, spawner, hub) as stubs:
        yield stubs


@asynccontextmanager
async def pulling(folder: Path, spawner: Spawner, hub: StandInHub, **settings: Any) -> AsyncIterator[Api]:
    settings = {"auto_pull": "any", "offline": False, **settings}
    async with serving(folder, spawner, hub_endpoint=hub.url, **settings) as (_, stubs):
        yield stubs


def found_in(folder: Path, name: str) -> list[Path]:
    """Files in a folder of the server's models."""
    return list((folder / "models" / name).glob("*"))


def pull(api: Api, name: str = NAME) -> Any:
    return api.models.PullModel(models_pb.PullModelRequest(name=name))


async def get(api: Api, name: str, **options: bool) -> models_pb.GetModelResponse:
    return await api.models.GetModel(models_pb.GetModelRequest(name=name, **options))


async def test_pull_brings_a_model_that_then_generates(api: Api, hub: StandInHub, size: int) -> None:
    steps = await collect(pull(api))
    events = [step.WhichOneof("event") for step in steps]
    assert events.count("started") == events.count("completed") == 1
    assert events[-1] == "completed"
    started = next(step.started for step in steps if step.HasField("started"))
    assert (started.name, started.total_bytes) == (NAME, size)
    assert started.source.revision == hub.commit(REPO)
    found = steps[-1].completed.model
    assert (found.sha256, found.size_bytes) == (started.sha256, size)
    assert found.status.state == pb.MODEL_STATE_AVAILABLE
    assert (found.source.hub.repo_id, found.source.hub.file) == (REPO, FILE)
    answer = await api.once(NAME, max_tokens=2, ignore_eos=True)
    assert answer.usage.completion_token_count == 2


async def test_split_model_is_pulled_loaded_and_removed_as_one(
    api: Api, hub: StandInHub, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    first = write_tiny_llama(tmp_path / "parts" / FILE, context_length=512, part_tensors=4)
    parts = sorted(first.parent.glob("*.gguf"))
    assert len(parts) > 2
    for part in parts:
        hub.add("owner/split", part.name, part)
    name = "owner/split:Q4_K_M"
    whole = await api.once(NAME, max_tokens=8, ignore_eos=True, temperature=0.0)
    answer = await api.once(name, max_tokens=8, ignore_eos=True, temperature=0.0)
    assert answer.choices[0].text == whole.choices[0].text
    found = await get(api, name)
    assert found.model.size_bytes == sum(part.stat().st_size for part in parts)
    assert [file.file for file in found.model.files] == [part.name for part in parts]
    await api.models.UnloadModel(models_pb.UnloadModelRequest(name=name))
    await api.models.DeleteModel(models_pb.DeleteModelRequest(name=name))
    assert found_in(tmp_path, "split") == []
    assert len(found_in(tmp_path, "blobs")) == 1


async def test_generate_downloads_loads_and_answers_with_its_steps(api: Api) -> None:
    events = await collect(api.generate(NAME, max_tokens=2, ignore_eos=True, queue_progress=True))
    found = kinds(events)
    assert found[0] == "model_progress"
    assert [kind for kind in found if kind != "model_progress"] == ["started", "delta", "completed"]
    statuses = [event.model_progress for event in events if event.HasField("model_progress")]
    stages = [status.pull.stage for status in statuses if status.HasField("pull")]
    assert pb.PULL_STAGE_DOWNLOADING in stages
    assert pb.MODEL_STATE_LOADING in [status.state for status in statuses]


async def test_callers_at_once_share_one_download(api: Api, hub: StandInHub) -> None:
    async with asyncio.timeout(WAIT_S):
        streams = await asyncio.gather(*(collect(pull(api)) for _ in range(5)))
    assert [steps[-1].WhichOneof("event") for steps in streams] == ["completed"] * 5
    assert len({request.range for request in hub.asked("storage")}) == len(hub.asked("storage"))


async def test_who_leaves_does_not_stop_a_download(api: Api, hub: StandInHub) -> None:
    gate = threading.Event()
    hub.fail(FILE, slow=gate)
    call = pull(api)
    await call.read()
    call.cancel()
    gate.set()

    async def is_here() -> bool:
        return await api.state(NAME) == "AVAILABLE"

    await eventually(is_here)


async def test_cancelled_download_ends_for_all_and_is_resumed_after_a_restart(
    tmp_path: Path, spawner: Spawner, hub: StandInHub
) -> None:
    # At this rate it takes seconds: it is under way when it is cancelled.
    async with pulling(tmp_path, spawner, hub, pull_rate_limit_mb_s=0.02) as api:
        ends = [
            asyncio.create_task(stream_fails(pull(api), Code.ABORTED, "PULL_CANCELLED")) for _ in range(2)
        ]
        await eventually(lambda: _asked(hub))
        async with asyncio.timeout(WAIT_S):
            await api.models.CancelPull(models_pb.CancelPullRequest(name=NAME))
            await asyncio.gather(*ends)
    async with pulling(tmp_path, spawner, hub) as api:
        assert (await collect(pull(api)))[-1].HasField("completed")


async def _asked(hub: StandInHub) -> bool:
    return bool(hub.asked("storage"))


async def test_wrong_bytes_are_never_a_model(api: Api, hub: StandInHub, tmp_path: Path) -> None:
    hub.fail(FILE, corrupt=ALWAYS)
    await stream_fails(pull(api), Code.DATA_LOSS, "CHECKSUM_MISMATCH")
    assert not found_in(tmp_path, "blobs")
    await fails(api.status(NAME), Code.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_a_hub_that_announces_another_file_than_the_catalog_is_refused(
    tmp_path: Path, spawner: Spawner, hub: StandInHub
) -> None:
    catalog = tmp_path / "catalog.toml"
    source = f'{{ repo_id = "{REPO}", file = "{FILE}" }}'
    catalog.write_text(
        f'[[model]]\nname = "mine"\ndescription = ""\nsource = {source}\nsha256 = "{"ab" * 32}"\n'
    )
    async with pulling(tmp_path, spawner, hub, catalog=catalog) as api:
        await stream_fails(pull(api, "mine"), Code.DATA_LOSS, "CHECKSUM_MISMATCH")
        assert not found_in(tmp_path, "blobs") and not found_in(tmp_path, "partial")


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        ({"gated": True}, Code.PERMISSION_DENIED, "HUB_ACCESS_DENIED"),
        ({"rate_limited": ALWAYS}, Code.RESOURCE_EXHAUSTED, "HUB_RATE_LIMITED"),
        ({"status": (503, ALWAYS)}, Code.UNAVAILABLE, "HUB_UNREACHABLE"),
    ],
)
async def test_refusals_of_the_hub_have_their_status(
    api: Api, hub: StandInHub, fault: dict[str, Any], code: Any, reason: str
) -> None:
    hub.fail(REPO, **fault)
    await stream_fails(pull(api), code, reason)


async def test_unknown_quantization_names_the_nearest(api: Api) -> None:
    _, details = await stream_fails(pull(api, f"{REPO}:Q4_K_S"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "Q4_K_M" in details.metadata["nearest"]


async def test_deleted_download_is_gone_from_the_disk(api: Api, size: int, tmp_path: Path) -> None:
    await collect(pull(api))
    removed = await api.delete(NAME)
    assert removed.released_bytes == size
    assert not found_in(tmp_path, "blobs")
    await fails(api.status(NAME), Code.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_model_that_was_never_downloaded_is_not_deleted(api: Api) -> None:
    await fails(api.delete("phi-2"), Code.NOT_FOUND, "MODEL_FILE_NOT_FOUND")


async def test_estimate_of_a_huge_cache_is_told_without_trying_it(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError("a dry run of it would take gigabytes")

    await collect(pull(api))
    monkeypatch.setattr("bear_grpc.models.estimate.probe", never)
    options = pb.LoadOptions(max_sequences=256, kv_cache_tokens=2**26, kv_unified=True)
    found = await api.models.EstimateMemory(models_pb.EstimateMemoryRequest(name=NAME, options=options))
    assert found.effective_options.kv_cache_tokens == 2**26
    assert found.devices[0].kv_cache_bytes > 2**30


async def test_downloads_beyond_the_bound_are_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bear_grpc.models.pulls.MAX_DOWNLOADS", 0)
    _, details = await stream_fails(pull(api), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert details.retry is not None


async def test_loaded_download_is_not_deleted(api: Api) -> None:
    await api.load(NAME)
    await fails(api.delete(NAME), Code.FAILED_PRECONDITION, "MODEL_IN_USE")


async def test_prune_tells_and_removes_what_no_model_needs(api: Api, hub: StandInHub, tmp_path: Path) -> None:
    hub.fail(FILE, corrupt=ALWAYS)
    await stream_fails(pull(api), Code.DATA_LOSS, "CHECKSUM_MISMATCH")
    told = await api.models.PruneModels(models_pb.PruneModelsRequest(dry_run=True))
    assert [file.path.split("/")[0] for file in told.files] == ["quarantine"]
    removed = await api.models.PruneModels(models_pb.PruneModelsRequest())
    assert removed.files == told.files
    assert not found_in(tmp_path, "quarantine")


async def test_downloads_are_there_after_a_restart_and_offline(
    tmp_path: Path, spawner: Spawner, hub: StandInHub
) -> None:
    async with pulling(tmp_path, spawner, hub) as api:
        await collect(pull(api))
    async with pulling(tmp_path, spawner, hub, offline=True) as api:
        assert await api.state(NAME) == "AVAILABLE"
        assert (await collect(pull(api)))[-1].HasField("completed")
        await stream_fails(pull(api, "phi-2"), Code.UNAVAILABLE, "HUB_UNREACHABLE")


@pytest.mark.parametrize(("auto_pull", "name"), [("never", "phi-2"), ("catalog", NAME)])
async def test_requests_download_only_what_the_settings_allow(
    tmp_path: Path, spawner: Spawner, hub: StandInHub, auto_pull: str, name: str
) -> None:
    async with pulling(tmp_path, spawner, hub, auto_pull=auto_pull) as api:
        details = await fails(api.once(name), Code.NOT_FOUND, "MODEL_FILE_NOT_FOUND")
        assert "pull" in details.message
        assert not hub.requests


async def test_file_on_the_hub_is_looked_at_without_downloading_it(
    api: Api, hub: StandInHub, size: int
) -> None:
    found = await get(api, LONG, include_metadata=True, include_tensors=True)
    assert found.model.architecture == "llama"
    assert found.model.status.state == pb.MODEL_STATE_ABSENT
    assert found.model.size_bytes == size
    assert found.tensors and found.metadata and found.quantization_mix
    assert all(request.range for request in hub.asked("storage"))
    await fails(api.status(LONG), Code.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_memory_of_a_file_on_the_hub_is_estimated(api: Api) -> None:
    source = pb.HubSource(repo_id=REPO, file=FILE)
    there = await api.models.EstimateMemory(models_pb.EstimateMemoryRequest(source=source))
    await collect(pull(api))
    here = await api.models.EstimateMemory(models_pb.EstimateMemoryRequest(name=NAME))
    for plan in (there, here):
        [device] = plan.devices
        parts = device.weights_bytes + device.kv_cache_bytes + device.compute_bytes + device.overhead_bytes
        assert device.needed_bytes == parts > 0
        assert plan.fits
    assert there.devices[0].kv_cache_bytes == here.devices[0].kv_cache_bytes
    assert there.effective_options == here.effective_options


async def test_watch_and_health_tell_the_whole_way(api: Api) -> None:
    watch = api.models.WatchModels(models_pb.WatchModelsRequest())
    await watch.read()
    await api.load(NAME)
    await api.unload(NAME)
    states: list[int] = []
    async with asyncio.timeout(WAIT_S):
        while pb.MODEL_STATE_UNLOADING not in states or states[-1] != pb.MODEL_STATE_AVAILABLE:
            status = (await watch.read()).status
            if status.name == NAME and states[-1:] != [status.state]:
                states.append(status.state)
    watch.cancel()
    assert states == [
        pb.MODEL_STATE_ABSENT,
        pb.MODEL_STATE_AVAILABLE,
        pb.MODEL_STATE_LOADING,
        pb.MODEL_STATE_READY,
        pb.MODEL_STATE_UNLOADING,
        pb.MODEL_STATE_AVAILABLE,
    ]
    assert await api.serving(f"models/{NAME}") == "NOT_SERVING"
