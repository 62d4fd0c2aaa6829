"""Settings of the server that the worker acts on, and what it measures for the next load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, eventually, serving

PROMPT = "the bear and one fish " * 10
ONE = pb.LoadOptions(threads=1, max_sequences=1)


async def tables(api: Api, name: str) -> list[pb.CostTable]:
    answer = await api.models.GetModel(models_pb.GetModelRequest(name=name))
    return list(answer.model.cost_tables)


@pytest.mark.parametrize(("sharing", "shared"), [("tenant", True), ("all", True), ("off", False)])
async def test_prefixes_are_shared_as_set(
    tmp_path: Path, spawner: Spawner, tiny_file: Path, sharing: str, shared: bool
) -> None:
    settings: dict[str, Any] = {"allow_path": [tiny_file.parent], "prefix_sharing": sharing}
    async with serving(tmp_path, spawner, **settings) as (_, api):
        await api.register("tiny", tiny_file, load_options=ONE)
        answers = [await api.once("tiny", PROMPT, max_tokens=1) for _ in range(2)]
        assert answers[0].usage.cached_token_count == 0
        assert (answers[1].usage.cached_token_count > 0) is shared


async def test_tenants_are_hosts_and_share_nothing(tmp_path: Path, spawner: Spawner, tiny_file: Path) -> None:
    settings: dict[str, Any] = {"listen": ["127.0.0.1:0", f"unix:{tmp_path}/bear.sock"]}
    async with serving(tmp_path, spawner, allow_path=[tiny_file.parent], **settings) as (server, api):
        await api.register("tiny", tiny_file, load_options=ONE)
        async with Api(server.addresses[1]) as other, Api(server.addresses[0]) as same:
            assert (await api.once("tiny", PROMPT, max_tokens=1)).usage.cached_token_count == 0
            assert (await other.once("tiny", PROMPT, max_tokens=1)).usage.cached_token_count == 0
            assert (await same.once("tiny", PROMPT, max_tokens=1)).usage.cached_token_count > 0
            assert (await other.once("tiny", PROMPT, max_tokens=1)).usage.cached_token_count > 0


async def test_what_was_measured_outlives_the_server(tmp_path: Path, spawner: Spawner) -> None:
    file = write_tiny_llama(tmp_path / "tiny.gguf", context_length=512)
    async with serving(tmp_path, spawner) as (_, api):
        await api.register("tiny", file, load_options=ONE)
        assert await tables(api, "tiny") == []
        await api.load("tiny")

        async def measured() -> list[pb.CostTable]:
            return await tables(api, "tiny")

        found = await eventually(measured)
        for table in found:
            sizes = [cost.token_count for cost in table.costs]
            assert table.threads == 1
            assert sizes == sorted(set(sizes))
            assert all(cost.seconds > 0 for cost in table.costs)
    async with serving(tmp_path, spawner) as (_, api):
        kept = await tables(api, "tiny")
        assert {(table.repack, table.threads) for table in kept} >= {(t.repack, t.threads) for t in found}
        watch = api.models.WatchModels(models_pb.WatchModelsRequest(names=["tiny"]))
        await watch.read()
        await api.load("tiny")
        stages = set()
        while (status := (await watch.read()).status).state != pb.MODEL_STATE_READY:
            stages.add(status.load_progress.stage)
        watch.cancel()
        assert stages  # which of them is seen depends on how fast they pass
        assert pb.LOAD_STAGE_MEASURING not in stages
