"""How long loaded models stay, over the API: times of requests and loads, pins, room for another model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, ask, eventually, serving

pytestmark = pytest.mark.model


@pytest.fixture
async def api(tmp_path: Path, spawner: Spawner) -> AsyncIterator[Api]:
    async with serving(tmp_path, spawner) as (_, stubs):
        await stubs.register("m", write_tiny_llama(tmp_path / "m.gguf"))
        yield stubs


async def use(api: Api, keep_alive_s: int | None = None) -> None:
    request = ask("m", max_tokens=1)
    if keep_alive_s is not None:
        request.keep_alive.FromSeconds(keep_alive_s)
    await api.inference.GenerateOnce(inference_pb.GenerateOnceRequest(request=request))


async def is_unloaded(api: Api) -> bool:
    return await api.state("m") == "AVAILABLE"


async def test_request_with_no_time_unloads_the_model_after_it(api: Api) -> None:
    await use(api, 0)
    await eventually(lambda: is_unloaded(api))


async def test_request_without_a_time_leaves_it_for_ever(api: Api) -> None:
    await use(api)
    assert await api.state("m") == "READY"
    assert not (await api.status("m")).HasField("expire_time")


async def test_time_of_a_request_is_shown_and_the_next_one_changes_it(api: Api) -> None:
    await use(api, 300)
    first = (await api.status("m")).expire_time.ToDatetime()
    await use(api, 600)
    second = (await api.status("m")).expire_time.ToDatetime()
    assert 290 < (second - first).total_seconds() < 400
    await use(api, -1)
    assert not (await api.status("m")).HasField("expire_time")


async def test_time_of_a_load_counts_from_the_load_and_a_second_load_changes_it(api: Api) -> None:
    await api.load("m", keep_alive={"seconds": 300})
    assert (await api.status("m")).HasField("expire_time")
    await api.load("m", keep_alive={"seconds": -1}, pinned=True)
    status = await api.status("m")
    assert not status.HasField("expire_time")
    assert status.effective_options.pinned


async def test_load_with_a_short_time_ends_by_itself(api: Api) -> None:
    await api.load("m", keep_alive={"nanos": 1_000_000})
    await eventually(lambda: is_unloaded(api))
