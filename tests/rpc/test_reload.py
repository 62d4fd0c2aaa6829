"""A running server takes over changed settings: what it does with the next request."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bear_grpc.config.fields import reloading
from bear_grpc.executor.spawner import Spawner
from bear_grpc.input_limits import InputLimits
from bear_grpc.server import Server
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import server_service_pb2 as server_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.hub import StandInHub
from tests.helpers.rpc import Api, Code, fails, read_until, serving

ONE = pb.LoadOptions(threads=1, max_sequences=1)
MODEL = """
[[model]]
name = "{name}"
description = "{description}"
source = {{ repo_id = "owner/{name}", file = "model.gguf" }}
"""


@pytest.fixture
async def pair(tmp_path: Path, spawner: Spawner) -> AsyncIterator[tuple[Server, Api]]:
    async with serving(tmp_path, spawner, allow_path=[]) as both:
        yield both


async def change(server: Server, **values: Any) -> None:
    new = msgspec.structs.replace(server.reloads.config, **values)
    await server.reloads.reload(lambda: new)


async def names(api: Api) -> list[str]:
    return [model.name for model in (await api.models.ListModels(models_pb.ListModelsRequest())).models]


async def test_every_setting_that_reloads_by_its_type_has_a_part_that_takes_it(
    pair: tuple[Server, Api],
) -> None:
    server, _ = pair
    taken = server.reloads.names
    assert [name for name in reloading() if name not in taken and name.split(".")[0] not in taken] == []
    tables = {name.split(".")[0] for name in reloading()}
    assert [name for name in taken if name not in reloading() and name not in tables] == []


async def test_limits_hold_for_the_next_request_and_are_told(pair: tuple[Server, Api]) -> None:
    server, api = pair
    await change(server, limits=InputLimits(max_text_bytes=4, max_message_bytes=1024))
    details = await fails(api.once("bear-demo", "abcde"), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert details.fields == ["request.prompt"]
    info = await api.server.GetServerInfo(server_pb.GetServerInfoRequest())
    assert info.limits.max_text_bytes == 4
    assert info.limits.max_message_bytes == InputLimits().max_message_bytes  # needs a restart


async def test_allowed_folders_change(pair: tuple[Server, Api], tiny_file: Path) -> None:
    server, api = pair
    request = models_pb.RegisterModelRequest(name="tiny", path=str(tiny_file))
    await fails(api.models.RegisterModel(request), Code.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
    await change(server, allow_path=[tiny_file.parent])
    await api.models.RegisterModel(request)
    info = await api.server.GetServerInfo(server_pb.GetServerInfoRequest())
    assert str(tiny_file.parent) in info.allowed_paths


async def test_the_longest_call_and_the_queue_of_a_loaded_model_change(
    pair: tuple[Server, Api], steady_file: Path
) -> None:
    server, api = pair
    await change(server, allow_path=[steady_file.parent])
    await api.register("steady", steady_file, load_options=ONE)
    first = api.generate("steady", max_tokens=1900, ignore_eos=True)
    await read_until(first, "delta")
    waiting = api.generate("steady", max_tokens=1, queue_progress=True)
    assert (await waiting.read()).HasField("queued")
    await change(server, max_waiting_requests=1, max_request_s=0.2)
    await fails(api.once("steady", max_tokens=1), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    waiting.cancel()
    first.cancel()
    await api.idle("steady")
    answer = await api.once("steady", max_tokens=1900, ignore_eos=True)
    assert answer.choices[0].finish_reason == inference_pb.FINISH_REASON_DEADLINE


async def test_the_time_of_idle_models_changes_but_not_one_that_was_asked_for(
    pair: tuple[Server, Api], tiny_file: Path
) -> None:
    server, api = pair
    await change(server, allow_path=[tiny_file.parent])
    await api.register("general", tiny_file, load_options=ONE)
    await api.register("own", tiny_file, load_options=ONE)
    await api.load("general")
    own = pb.LoadOptions()
    own.keep_alive.FromSeconds(1000)
    await api.models.LoadModel(models_pb.LoadModelRequest(name="own", options=own))
    until = (await api.status("own")).expire_time
    assert not (await api.status("general")).HasField("expire_time")
    await change(server, keep_alive_s=500.0)
    assert (await api.status("general")).HasField("expire_time")
    assert (await api.status("own")).expire_time == until


async def test_the_log_level_changes(pair: tuple[Server, Api]) -> None:
    root = logging.getLogger()
    before = root.level
    try:
        await change(pair[0], log_level="ERROR")
        assert root.level == logging.ERROR
    finally:
        root.setLevel(before)


async def test_a_catalog_is_read_again_and_watchers_see_it(pair: tuple[Server, Api], tmp_path: Path) -> None:
    server, api = pair
    file = tmp_path / "catalog.toml"
    file.write_text(MODEL.format(name="one", description="first") + MODEL.format(name="two", description="x"))
    await change(server, catalog=file)
    assert {"one", "two"} <= {*await names(api)}
    file.write_text(MODEL.format(name="one", description="second"))
    await change(server)
    assert "two" not in await names(api)
    model = (await api.models.GetModel(models_pb.GetModelRequest(name="one"))).model
    assert model.description == "second"
    await change(server, catalog=None)
    assert "one" not in await names(api)
    assert "bear-demo" in await names(api)


async def test_a_token_and_what_requests_may_download_change(
    tmp_path: Path, spawner: Spawner, tiny_file: Path
) -> None:
    with StandInHub(token="hf_right") as hub:
        hub.add("owner/repo", "tiny.Q4_K_M.gguf", tiny_file)
        hub.fail("owner/repo", gated=True)
        settings: dict[str, Any] = {"hub_endpoint": hub.url, "hub_token": "hf_wrong", "offline": False}
        async with serving(tmp_path, spawner, auto_pull="any", **settings) as (server, api):
            name = "owner/repo:Q4_K_M"
            await fails(api.once(name, max_tokens=1), Code.PERMISSION_DENIED, "HUB_ACCESS_DENIED")
            await change(server, hub_token="hf_right", auto_pull="never")
            await fails(api.once(name, max_tokens=1), Code.NOT_FOUND, "MODEL_FILE_NOT_FOUND")
            await change(server, auto_pull="any", pull_rate_limit_mb_s=1000.0)
            assert (await api.once(name, max_tokens=1)).usage.completion_token_count == 1


async def test_a_wrong_catalog_changes_nothing(
    pair: tuple[Server, Api], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, api = pair
    file = tmp_path / "catalog.toml"
    file.write_text("[[model]]\nname = 5\n")
    before = await names(api)
    await change(server, catalog=file, allow_path=[tmp_path])
    assert (server.reloads.config.catalog, server.shelf.allowed_roots[1:]) == (None, [])
    assert await names(api) == before
    assert "catalog.toml" in caplog.text
