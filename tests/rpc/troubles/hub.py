"""Downloads that end otherwise than they should."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

from bear_grpc.v1 import model_service_pb2 as models_pb
from tests.helpers.hub import ALWAYS
from tests.helpers.rpc import Api, StatusDetails, collect, eventually

from .bench import FILE, PULLED, REPO, Bench, pull


async def arrives(api: Api) -> None:
    """The model can be pulled now."""
    assert (await collect(pull(api)))[-1].HasField("completed")


async def refused_by(bench: Bench, reason: str, target: str, **fault: Any) -> list[StatusDetails]:
    """The hub has a fault; once that is over the model arrives."""
    with bench.hub() as hub:
        hub.fail(target, **fault)
        async with bench.pulling(hub) as api:
            told = await bench.cut(pull(api), reason)
            hub.heal()
            await arrives(api)
    return [told]


async def hub_access_denied(bench: Bench) -> list[StatusDetails]:
    with bench.hub(token="hf_opens") as hub:
        hub.fail(REPO, gated=True)
        async with bench.pulling(hub) as api:
            told = await bench.cut(pull(api), "HUB_ACCESS_DENIED")
        async with bench.pulling(hub, hub_token="hf_opens") as api:
            await arrives(api)
    return [told]


async def hub_rate_limited(bench: Bench) -> list[StatusDetails]:
    told = await refused_by(bench, "HUB_RATE_LIMITED", REPO, rate_limited=1, retry_after="1")
    assert told[0].retry is not None
    assert told[0].retry.retry_delay.seconds == 1
    return told


async def hub_unreachable(bench: Bench) -> list[StatusDetails]:
    with bench.hub() as hub:
        hub.fail(REPO, status=(503, 1))
        async with bench.pulling(hub) as api:
            fault = await bench.cut(pull(api), "HUB_UNREACHABLE")
            await arrives(api)
            await api.delete(PULLED)
        async with bench.pulling(hub, offline=True) as api:
            offline = await bench.cut(pull(api), "HUB_UNREACHABLE")
            assert offline.retry is None
        async with bench.pulling(hub) as api:
            await arrives(api)
    return [fault, offline]


async def hub_answer_invalid(bench: Bench) -> list[StatusDetails]:
    page = b"<html>Please log in to this network</html>"
    return await refused_by(bench, "HUB_ANSWER_INVALID", REPO, listing=lambda _: page)


async def checksum_mismatch(bench: Bench) -> list[StatusDetails]:
    with bench.hub() as hub:
        hub.fail(FILE, corrupt=ALWAYS)
        async with bench.pulling(hub) as api:
            told = await bench.cut(pull(api), "CHECKSUM_MISMATCH")
            pruned = await api.models.PruneModels(models_pb.PruneModelsRequest())
            assert [file.path.split("/")[0] for file in pruned.files] == ["quarantine"]
            hub.heal()
            await arrives(api)
    return [told]


async def disk_full(bench: Bench) -> list[StatusDetails]:
    with bench.hub() as hub:
        async with bench.pulling(hub) as api:
            with bench.patch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 20))
                told = await bench.cut(pull(api), "DISK_FULL")
            assert told.metadata["model"] == PULLED
            await arrives(api)
    return [told]


async def pull_cancelled(bench: Bench) -> list[StatusDetails]:
    with bench.hub() as hub:
        # At this rate it takes seconds: it is under way when it is cancelled.
        async with bench.pulling(hub, pull_rate_limit_mb_s=0.02) as api:
            download = pull(api)

            async def is_under_way() -> bool:
                return bool(hub.asked("storage"))

            await eventually(is_under_way)
            await api.models.CancelPull(models_pb.CancelPullRequest(name=PULLED))
            told = await bench.cut(download, "PULL_CANCELLED")
        async with bench.pulling(hub) as api:
            await arrives(api)
    return [told]
