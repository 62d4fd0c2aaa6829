"""Quotas over a real server: what is refused and when it is free again; and the record of what was used."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from bear_grpc import server as server_module
from bear_grpc.access.caller import Quotas, Scope
from bear_grpc.access.key import DEFAULT_SCOPES, id_of
from bear_grpc.access.keys import KeyStore
from bear_grpc.access.quotas import DAY_S, Limiter
from bear_grpc.access.usage import Group, Totals, UsageStore, day_of
from bear_grpc.cli import app
from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.usage import UsageObserver
from bear_grpc.server import Server
from bear_grpc.testing.clock import FakeClock
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from tests.helpers.rpc import (
    Api,
    Code,
    StatusDetails,
    collect,
    eventually,
    fails,
    read_until,
    serving,
    stream_fails,
)

EXCEEDED = (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
NOON = 20_000 * DAY_S + DAY_S / 2
LONG = {"max_tokens": 1900, "ignore_eos": True}


@dataclasses.dataclass
class Limited:
    """A server that asks for keys, with one model; its quotas go by clocks that move when they are told."""

    server: Server
    folder: Path
    clock: FakeClock
    wall: FakeClock
    last_id: str = ""

    @asynccontextmanager
    async def caller(self, **quotas: int) -> AsyncIterator[Api]:
        """A client with a key of its own."""
        with KeyStore(self.folder / "state") as store:
            _, text = store.create(quotas=Quotas(**quotas))
        assert self.server.keys is not None
        await self.server.keys.refresh()
        self.last_id = id_of(text) or ""
        async with Api(self.server.addresses[0], key=text) as api:
            yield api

    def pass_(self, told: StatusDetails) -> None:
        """As much time passes as the refusal says."""
        assert told.retry is not None
        seconds = told.retry.retry_delay.ToNanoseconds() / 1e9
        self.clock.advance(seconds)
        self.wall.advance(seconds)

    def check(self, told: StatusDetails, quota: str, limit: int) -> None:
        assert told.metadata == {"subject": self.last_id, "quota": quota, "limit": str(limit)}
        assert told.quota is not None and told.retry is not None
        [violation] = told.quota.violations
        assert (violation.subject, violation.description) == (self.last_id, f"{quota}: {limit}")


@asynccontextmanager
async def limited_server(folder: Path, spawner: Spawner, tiny_file: Path) -> AsyncIterator[Limited]:
    settings = {"auth": "keys", "auto_pull": "never", "allow_path": [tiny_file.parent]}
    clock, wall = FakeClock(), FakeClock(NOON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "Limiter", functools.partial(Limiter, clock, wall))
        patch.setattr(server_module, "UsageObserver", functools.partial(UsageObserver, wall=wall))
        with KeyStore(folder / "state") as store:
            _, text = store.create(scopes=frozenset(Scope))
        async with serving(folder, spawner, **settings) as (server, _):
            async with Api(server.addresses[0], key=text) as api:
                if server.shelf.find("tiny") is None:
                    await api.register("tiny", tiny_file)
                await api.load("tiny")
            yield Limited(server, folder, clock, wall)


@pytest.fixture(scope="module")
async def limited(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, tiny_file: Path
) -> AsyncIterator[Limited]:
    async with limited_server(tmp_path_factory.mktemp("quotas"), spawner, tiny_file) as found:
        yield found


async def count(api: Api) -> Any:
    return await api.inference.CountTokens(inference_pb.CountTokensRequest(model="tiny", prompt="hello"))


async def test_requests_are_refused_until_there_is_one_again(limited: Limited) -> None:
    async with limited.caller(requests_per_minute=2) as api:
        await count(api)
        await api.once("tiny", max_tokens=1)
        told = await fails(count(api), *EXCEEDED)
        limited.check(told, "requests_per_minute", 2)
        await stream_fails(api.generate("tiny"), *EXCEEDED)
        assert await api.state("tiny") == "READY"  # of inference only
        limited.pass_(told)
        await collect(api.generate("tiny", max_tokens=1))


async def test_answer_overdraws_once_and_is_not_cut(limited: Limited) -> None:
    async with limited.caller(tokens_per_minute=20) as api:
        answer = await api.once("tiny", max_tokens=100, ignore_eos=True)
        used = answer.usage.prompt_token_count + answer.usage.completion_token_count
        assert answer.usage.completion_token_count == 100
        told = await fails(api.once("tiny", max_tokens=1), *EXCEEDED)
        limited.check(told, "tokens_per_minute", 20)
        assert told.retry is not None
        assert told.retry.retry_delay.seconds == (used - 20 + 1) * 3
        await count(api)
        limited.pass_(told)
        await api.once("tiny", max_tokens=1)


async def test_tokens_are_charged_while_they_are_drawn(limited: Limited) -> None:
    async with limited.caller(tokens_per_minute=30) as api:
        stream = api.generate("tiny", **LONG)
        await read_until(stream, "delta", 30)
        limited.check(await fails(api.once("tiny"), *EXCEEDED), "tokens_per_minute", 30)
        stream.cancel()


async def test_streams_are_free_again_however_they_end(limited: Limited) -> None:
    async with limited.caller(concurrent_streams=1) as api:
        for model in ("tiny", "nobody", "tiny"):
            stream = api.generate("tiny", **LONG)
            await read_until(stream, "started")
            limited.check(await fails(api.once("tiny"), *EXCEEDED), "concurrent_streams", 1)
            await count(api)
            stream.cancel()

            async def is_free(model: str = model) -> bool:
                try:
                    await api.once(model, max_tokens=1)
                except grpc.aio.AioRpcError as exc:
                    return exc.code() is Code.NOT_FOUND
                return True

            await eventually(is_free)


async def test_crowd_gets_no_more_streams_than_may_run(limited: Limited) -> None:
    async with limited.caller(concurrent_streams=3) as api:
        for _ in range(5):
            streams = [api.generate("tiny", **LONG) for _ in range(12)]
            admitted = 0
            for stream in streams:
                try:
                    await read_until(stream, "delta")
                    admitted += 1
                except grpc.aio.AioRpcError as exc:
                    assert exc.code() is Code.RESOURCE_EXHAUSTED
            assert admitted == 3
            for stream in streams:
                stream.cancel()

            async def is_quiet() -> bool:
                return limited.server.limiter._accounts[limited.last_id].streams == 0

            await eventually(is_quiet)


async def test_day_is_refused_until_the_next_one(limited: Limited) -> None:
    async with limited.caller(tokens_per_day=30) as api:
        await api.once("tiny", max_tokens=40, ignore_eos=True)
        told = await fails(api.once("tiny"), *EXCEEDED)
        limited.check(told, "tokens_per_day", 30)
        limited.pass_(told)
        await api.once("tiny", max_tokens=1)
    limited.wall.now = NOON


async def test_callers_without_quotas_are_not_limited(limited: Limited) -> None:
    async with limited.caller() as api:
        for _ in range(5):
            await count(api)
        assert limited.last_id not in limited.server.limiter._accounts


async def test_record_is_what_the_answers_told_and_the_day_goes_on_after_a_restart(
    tmp_path: Path, spawner: Spawner, tiny_file: Path
) -> None:
    folder, told, prompt = tmp_path, [0, 0, 0], list(range(10, 50))
    with KeyStore(folder / "state") as store:
        key, text = store.create(quotas=Quotas(tokens_per_day=100), scopes=DEFAULT_SCOPES)
    for start in range(2):
        async with (
            limited_server(folder, spawner, tiny_file) as limited,
            Api(limited.server.addresses[0], key=text) as api,
        ):
            if start:
                limited.last_id = key.id
                limited.check(await fails(api.once("tiny"), *EXCEEDED), "tokens_per_day", 100)
                continue
            stream = await collect(api.generate("tiny", token_ids=prompt, max_tokens=9, n=2, stop=["zzzz"]))
            answers = [event.completed.usage for event in stream if event.HasField("completed")]
            once = await api.once("tiny", token_ids=prompt, max_tokens=60, ignore_eos=True)
            for usage in (*answers, once.usage):
                told[0] += usage.prompt_token_count
                told[1] += usage.cached_token_count
                told[2] += usage.completion_token_count
            await count(api)
            await fails(api.once("tiny"), *EXCEEDED)
    with UsageStore(folder / "state") as record:
        kept = record.read()
    assert told[0] and told[1] and told[2]
    assert {group.key_id for group in kept} == {key.id}
    by_model = {group.model: totals for group, totals in kept.items()}
    assert by_model == {"tiny": Totals(3, *told), "": Totals(2, errors=2)}
    assert {group.day for group in kept} == {day_of(NOON)}
    environ = {"BEAR_STATE_DIR": str(folder / "state")}
    shown = CliRunner().invoke(
        app, ["usage", "--json", "--by", "key", "--since", day_of(NOON)], env=environ, catch_exceptions=False
    )
    assert json.loads(shown.stdout)[0]["completion_tokens"] == told[2]


async def test_cancelled_answers_are_counted_as_far_as_they_came(limited: Limited) -> None:
    async with limited.caller() as api:
        stream = api.generate("tiny", **LONG)
        await read_until(stream, "delta", 20)
        stream.cancel()

        async def counted() -> Totals | None:
            with UsageStore(limited.folder / "state") as record:
                found = record.read(key_id=limited.last_id)
            return next(iter(found.values()), None)

        totals = await eventually(counted)
        assert totals is not None
        assert (totals.requests, totals.errors) == (1, 0)
        assert 20 <= totals.completion_tokens < 1900
        assert totals.prompt_tokens > 0


async def test_answers_that_end_with_their_key_are_counted_too(limited: Limited) -> None:
    """They have the code of calls that were never let in, which are not counted."""
    async with limited.caller() as api:
        stream = api.generate("tiny", **LONG)
        await read_until(stream, "delta", 20)
        with KeyStore(limited.folder / "state") as store:
            assert store.revoke(limited.last_id)
        assert limited.server.keys is not None
        await limited.server.keys.refresh()
        await stream_fails(stream, Code.UNAUTHENTICATED, "KEY_INVALID")
        await fails(count(api), Code.UNAUTHENTICATED, "KEY_INVALID")

        async def counted() -> Totals | None:
            with UsageStore(limited.folder / "state") as record:
                found = record.read(key_id=limited.last_id)
            return next(iter(found.values()), None)

        totals = await eventually(counted)
        assert totals is not None
        assert (totals.requests, totals.errors) == (1, 1)
        assert totals.completion_tokens >= 20 and totals.prompt_tokens > 0


async def test_anonymous_calls_are_counted_together(
    tmp_path: Path, spawner: Spawner, tiny_file: Path
) -> None:
    async with serving(tmp_path, spawner, allow_path=[tiny_file.parent]) as (_, api):
        await api.register("tiny", tiny_file)
        await api.once("tiny", max_tokens=3, ignore_eos=True)
        await fails(api.once("made up"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    with UsageStore(tmp_path / "state") as record:
        [(nothing, failed), (group, totals)] = record.read().items()
    assert nothing == Group(group.day, "", "") and failed == Totals(1, errors=1)
    assert (group.key_id, group.model, totals.completion_tokens) == ("", "tiny", 3)
    assert group.day <= day_of(__import__("time").time())
