"""Nobody without a valid key reaches a servicer, and a key opens what its scopes and models say."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2 as details_pb
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from bear_grpc.access.authentication import Authenticator
from bear_grpc.access.caller import Scope
from bear_grpc.access.key import Key, digest_of, id_of, new_id_and_secret, text_of
from bear_grpc.access.keys import FILE, KeyStore
from bear_grpc.access.policy import OPEN, SCOPES
from bear_grpc.access.slowing import Failures
from bear_grpc.config import ConfigError, ServerConfig
from bear_grpc.executor.spawner import Spawner
from bear_grpc.params import Priority
from bear_grpc.rpc import access
from bear_grpc.rpc.access import Access
from bear_grpc.rpc.call import Call
from bear_grpc.rpc.calls import Calls
from bear_grpc.rpc.subjects import SUBJECTS
from bear_grpc.server import Server
from bear_grpc.testing.clock import FakeClock
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import Api, Code, ask, eventually, fails, read_until, serving, stream_fails

# What the contract says, apart from the code.
OPENS = {
    Scope.INFER: {"Generate", "GenerateOnce", "Tokenize", "Detokenize", "CountTokens"},
    Scope.MODELS_READ: {
        *("ListModels", "GetModel", "GetModelStatus", "WatchModels", "EstimateMemory"),
        *("GetServerInfo", "GetLoad", "WatchLoad"),
    },
    Scope.MODELS_ADMIN: {
        *("PullModel", "CancelPull", "LoadModel", "UnloadModel"),
        *("RegisterModel", "DeleteModel", "PruneModels"),
    },
    Scope.SERVER_ADMIN: {"Drain", "ServerReflectionInfo"},
}
EVERYTHING = frozenset(Scope)
HEALTH = "grpc.health.v1.Health"
ORCA = "xds.service.orca.v3.OpenRcaService"
V1 = "grpc.reflection.v1.ServerReflection"
REFUSED = (Code.UNAUTHENTICATED, "KEY_INVALID")


@dataclasses.dataclass
class Locked:
    """A server that asks for keys, with one model, and the keys as `bear keys` makes them."""

    server: Server
    store: KeyStore

    async def key(self, scopes: frozenset[Scope] = EVERYTHING, **chosen: Any) -> str:
        _, text = self.store.create(scopes=scopes, **chosen)
        await self.refresh()
        return text

    async def refresh(self) -> None:
        assert self.server.keys is not None
        await self.server.keys.refresh()

    async def revoke(self, key: str) -> None:
        assert self.store.revoke(id_of(key) or "")
        await self.refresh()

    def api(self, key: str = "") -> Api:
        return Api(self.server.addresses[0], key=key)


@pytest.fixture(scope="module")
async def locked(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, tiny_file: Path
) -> AsyncIterator[Locked]:
    folder = tmp_path_factory.mktemp("access")
    settings = {"auth": "keys", "auto_pull": "never", "allow_path": [tiny_file.parent]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bear_grpc.access.slowing.FREE_FAILURES", 10**9)  # answers come at once
        async with serving(folder, spawner, **settings) as (server, _):
            with KeyStore(folder / "state") as store:
                found = Locked(server, store)
                async with found.api(await found.key()) as api:
                    await api.register("tiny", tiny_file, aliases=["small"])
                    await api.load("tiny")
                yield found


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as reflection tells it."""

    service: str
    name: str
    streams_requests: bool
    streams_responses: bool

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"

    async def call(self, api: Api) -> tuple[grpc.StatusCode, str]:
        """Code and reason of a call with an empty request; of a stream those of its beginning."""
        kinds = (
            "stream" if streams else "unary" for streams in (self.streams_requests, self.streams_responses)
        )
        method = getattr(api.calls, "_".join(kinds))(self.path)
        call = method(iter([b""])) if self.streams_requests else method(b"")
        try:
            async with asyncio.timeout(30):
                await (call.read() if self.streams_responses else call)
        except grpc.aio.AioRpcError as exc:
            status = rpc_status.from_call(exc)  # type: ignore[arg-type]
            info = details_pb.ErrorInfo()
            assert status is None or any(each.Unpack(info) for each in status.details)
            return exc.code(), info.reason
        call.cancel()
        return Code.OK, ""


@pytest.fixture(scope="module")
async def methods(locked: Locked) -> list[Method]:
    """Every method of every service that the server names by reflection, but those of health."""
    async with locked.api(await locked.key()) as api:
        stub = reflection_pb2_grpc.ServerReflectionStub(api.calls)
        ask_for = reflection_pb2.ServerReflectionRequest
        listed = [answer async for answer in stub.ServerReflectionInfo(iter([ask_for(list_services="")]))]
        services = [service.name for service in listed[0].list_services_response.service]
        questions = [ask_for(file_containing_symbol=service) for service in services]
        files = [
            FileDescriptorProto.FromString(data)
            async for answer in stub.ServerReflectionInfo(iter(questions))
            for data in answer.file_descriptor_response.file_descriptor_proto
        ]
    found = {
        Method(f"{file.package}.{service.name}", each.name, each.client_streaming, each.server_streaming)
        for file in files
        for service in file.service
        for each in service.method
    }
    assert {method.service for method in found} == {*services}
    # Reflection's second version has the same messages, and does not name itself.
    [itself] = [method for method in found if method.name == "ServerReflectionInfo"]
    found.add(dataclasses.replace(itself, service=V1))
    # Drain comes last: it would refuse what comes after it.
    return sorted(
        (method for method in found if method.service not in (HEALTH, ORCA)),
        key=lambda each: (each.name == "Drain", each.path),
    )


async def test_policy_has_every_method_that_is_served_and_no_other(methods: list[Method]) -> None:
    assert {method.path for method in methods} == {*SCOPES}
    assert {method.name for method in methods} == set[str]().union(*OPENS.values())
    assert {path.split("/")[1] for path in OPEN} == {HEALTH, ORCA}


async def test_call_without_a_key_is_refused_by_every_method(locked: Locked, methods: list[Method]) -> None:
    async with locked.api() as api:
        for method in methods:
            assert await method.call(api) == (Code.UNAUTHENTICATED, "KEY_MISSING"), method


@pytest.mark.parametrize(
    "what", ["unknown id", "wrong secret", "revoked", "expired", "no key at all", "without a secret"]
)
async def test_call_with_a_key_that_is_not_valid_is_refused_by_every_method(
    locked: Locked, methods: list[Method], what: str
) -> None:
    """All of them alike: not even who had the key may learn what became of it."""
    good = await locked.key()
    match what:
        case "unknown id":
            key = text_of(*new_id_and_secret())
        case "wrong secret":
            key = text_of(id_of(good) or "", new_id_and_secret()[1])
        case "revoked":
            key = good
            await locked.revoke(key)
        case "expired":
            with KeyStore(locked.store.file.parent, FakeClock(1000.0)) as long_ago:
                _, key = long_ago.create(scopes=EVERYTHING, expires_s=2000.0)
            await locked.refresh()
        case "no key at all":
            key = "letmein"
        case _:
            key = good.rpartition("_")[0]
    async with locked.api(key) as api:
        for method in methods:
            assert await method.call(api) == REFUSED, method


@pytest.mark.parametrize("scope", [Scope.INFER, Scope.MODELS_READ, Scope.MODELS_ADMIN])
async def test_scope_opens_its_methods_and_no_other(
    locked: Locked, methods: list[Method], scope: Scope
) -> None:
    async with locked.api(await locked.key(frozenset({scope}))) as api:
        for method in methods:
            code, reason = await method.call(api)
            assert ((code, reason) != (Code.PERMISSION_DENIED, "SCOPE_MISSING")) == (
                method.name in OPENS[scope]
            ), method
            assert code is not Code.UNAUTHENTICATED


async def test_missing_scope_is_named(locked: Locked) -> None:
    async with locked.api(await locked.key(frozenset({Scope.INFER}))) as api:
        told = await fails(api.load("tiny"), Code.PERMISSION_DENIED, "SCOPE_MISSING")
    assert told.metadata == {"method": "/bear_grpc.v1.ModelService/LoadModel", "scope": "models:admin"}


async def test_scope_of_the_server_opens_drain_and_reflection_only(
    tmp_path: Path, spawner: Spawner, methods: list[Method]
) -> None:
    async with serving(tmp_path, spawner, auth="keys") as (server, _):
        with KeyStore(tmp_path / "state") as store:
            admin = Locked(server, store)
            async with admin.api(await admin.key(frozenset({Scope.SERVER_ADMIN}))) as api:
                for method in methods:
                    expected = (
                        (Code.OK, "")
                        if method.name in OPENS[Scope.SERVER_ADMIN]
                        else (Code.PERMISSION_DENIED, "SCOPE_MISSING")
                    )
                    assert await method.call(api) == expected, method


class Counting(grpc.GenericRpcHandler):
    """Answers whatever is called, and keeps what was."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def service(self, details: Any) -> Any:
        async def behaviour(request: Any, context: Any) -> bytes:
            self.reached.append(details.method)
            return b""

        return grpc.unary_unary_rpc_method_handler(behaviour)


@pytest.mark.parametrize("with_keys", [True, False])
async def test_servicers_are_reached_by_callers_who_may_and_by_nobody_else(
    tmp_path: Path, with_keys: bool
) -> None:
    key_id, secret = new_id_and_secret()
    keys = Authenticator([Key(id=key_id, secret_sha256=digest_of(secret), scopes=EVERYTHING)])
    handler = Counting()
    interceptors = [Calls(), Access(str, keys if with_keys else None, Failures(lambda: 0.0))]
    server = grpc.aio.server(interceptors=interceptors)
    server.add_generic_rpc_handlers((handler,))
    address = f"unix:{tmp_path}/counting.sock"
    server.add_insecure_port(address)
    await server.start()
    try:
        async with Api(address) as anonymous, Api(address, key=text_of(key_id, secret)) as known:
            for path in SCOPES:
                for api, may in ((anonymous, not with_keys), (known, True)):
                    handler.reached.clear()
                    call = api.calls.unary_unary(path)(b"", timeout=0.5)
                    try:
                        await call
                    except grpc.aio.AioRpcError:
                        assert not may, path
                    assert handler.reached == [path] * may
            handler.reached.clear()
            forgotten = known.calls.unary_unary("/bear_grpc.v1.ServerService/Forgotten")(b"")
            await fails(forgotten, Code.PERMISSION_DENIED, "SCOPE_MISSING")
            assert handler.reached == []
    finally:
        await server.stop(0)


async def test_key_is_taken_from_either_header(locked: Locked) -> None:
    key = await locked.key()
    async with locked.api() as api:
        for metadata in ((("authorization", f"bearer {key}"),), (("x-api-key", key),)):
            await api.models.ListModels(models_pb.ListModelsRequest(), metadata=metadata)


async def test_caller_is_the_key_and_its_own_tenant(locked: Locked) -> None:
    ended: list[Call] = []

    class Observer:
        def begin(self, call: Call) -> None:
            pass

        def end(self, call: Call) -> None:
            ended.append(call)

    locked.server.calls.add(Observer())
    key = await locked.key(name="who")
    async with locked.api(key) as api, locked.api() as nobody:
        await api.once("tiny", max_tokens=1)
        await fails(nobody.once("tiny"), Code.UNAUTHENTICATED, "KEY_MISSING")

    async def both() -> bool:
        return len(ended) == 2

    await eventually(both)
    known, unknown = ended
    assert (known.caller.id, known.caller.tenant) == (id_of(key), id_of(key))
    assert (unknown.caller.id, unknown.caller.tenant, unknown.reason) == ("", "unix", "KEY_MISSING")
    assert not unknown.caller.scopes and not unknown.caller.may_use("tiny")


# Health


async def test_health_of_the_server_is_for_everybody(locked: Locked) -> None:
    for key in ("", "letmein", await locked.key(models=("nothing",))):
        async with locked.api(key) as api:
            assert await api.serving("") == "SERVING"
            assert await api.serving("bear_grpc.v1.InferenceService") == "SERVING"
            assert await api.serving("liveness") == "SERVING"
            watch = api.health.Watch(health_pb2.HealthCheckRequest(service=""))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()


@pytest.mark.parametrize("name", ["tiny", "nothing"])
async def test_health_of_a_model_is_for_those_who_may_use_it(locked: Locked, name: str) -> None:
    request = health_pb2.HealthCheckRequest(service=f"models/{name}")
    async with locked.api() as api:
        await fails(api.health.Check(request), Code.UNAUTHENTICATED, "KEY_MISSING")
        await stream_fails(api.health.Watch(request), Code.UNAUTHENTICATED, "KEY_MISSING")
    async with locked.api(await locked.key(models=("other*",))) as api:
        await fails(api.health.Check(request), Code.PERMISSION_DENIED, "MODEL_DENIED")
        await stream_fails(api.health.Watch(request), Code.PERMISSION_DENIED, "MODEL_DENIED")


async def test_health_lists_models_for_those_who_may_use_them(locked: Locked) -> None:
    async def listed(api: Api) -> set[str]:
        answer = await api.health.List(health_pb2.HealthListRequest())
        return {name for name in answer.statuses if name.startswith("models/")}

    async with locked.api() as api:
        assert await listed(api) == set()
    async with locked.api(await locked.key(models=("tin?",))) as api:
        assert await listed(api) == {"models/tiny"}
    async with locked.api(await locked.key()) as api:
        assert {"models/tiny", "models/bear-demo"} <= await listed(api)


# Models

DENIED = (Code.PERMISSION_DENIED, "MODEL_DENIED")


def requests_for(name: str) -> dict[str, Any]:
    """For every method that is about models a request about this one."""
    generate = ask(name, "hello", max_tokens=1)
    return {
        "Generate": generate,
        "GenerateOnce": inference_pb.GenerateOnceRequest(request=generate),
        "Tokenize": inference_pb.TokenizeRequest(model=name, text="hello"),
        "Detokenize": inference_pb.DetokenizeRequest(model=name, token_ids=[1]),
        "CountTokens": inference_pb.CountTokensRequest(model=name, prompt="hello"),
        "GetModel": models_pb.GetModelRequest(name=name),
        "GetModelStatus": models_pb.GetModelStatusRequest(name=name),
        "WatchModels": models_pb.WatchModelsRequest(names=[name]),
        "EstimateMemory": models_pb.EstimateMemoryRequest(name=name),
        "PullModel": models_pb.PullModelRequest(name=name),
        "CancelPull": models_pb.CancelPullRequest(name=name),
        "LoadModel": models_pb.LoadModelRequest(name=name),
        "UnloadModel": models_pb.UnloadModelRequest(name=name),
        "RegisterModel": models_pb.RegisterModelRequest(name=name, path="/nowhere"),
        "DeleteModel": models_pb.DeleteModelRequest(name=name),
        "PruneModels": models_pb.PruneModelsRequest(dry_run=True),
    }


async def send(api: Api, method: str, request: Any) -> None:
    stub = api.inference if hasattr(api.inference, method) else api.models
    call = getattr(stub, method)(request)
    async with asyncio.timeout(30):
        await (call.read() if hasattr(call, "read") else call)


@pytest.mark.parametrize("name", ["tiny", "small", "nothing", "owner/repo:Q4_K_M"])
async def test_model_that_is_not_allowed_is_refused_whether_or_not_there_is_one(
    locked: Locked, name: str
) -> None:
    requests = requests_for(name)
    assert {path.rpartition("/")[2] for path in SUBJECTS} == {*requests}
    async with locked.api(await locked.key(models=("bear-*",))) as api:
        for method, request in requests.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(api, method, request)
            told = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
            info = details_pb.ErrorInfo()
            assert told is not None and told.details[0].Unpack(info)
            assert (caught.value.code(), info.reason) == DENIED, method
            expected = "*" if method == "PruneModels" else name
            assert dict(info.metadata) == {"model": expected}, method


async def test_model_is_allowed_by_its_own_name_whatever_it_is_called_by(locked: Locked) -> None:
    async with locked.api(await locked.key(models=("tiny",))) as api:
        await api.once("small", max_tokens=1)
        # The pattern allows the name, so that the truth may be told.
        await fails(api.once(""), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    async with locked.api(await locked.key(models=("small", "nothing", "owner/*"))) as api:
        await fails(api.once("small"), *DENIED)
        await fails(api.once("nothing"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
        await fails(api.status("owner/repo:q4_k_m"), Code.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_source_and_aliases_are_names_too(locked: Locked) -> None:
    source = pb.HubSource(repo_id="owner/repo", file="a.gguf")
    async with locked.api(await locked.key(models=("tiny*",))) as api:
        pull = api.models.PullModel(models_pb.PullModelRequest(source=source))
        await stream_fails(pull, *DENIED)
        await fails(api.models.EstimateMemory(models_pb.EstimateMemoryRequest(source=source)), *DENIED)
        register = models_pb.RegisterModelRequest(name="tiny2", path="/nowhere", aliases=["big"])
        assert (await fails(api.models.RegisterModel(register), *DENIED)).metadata == {"model": "big"}


async def test_lists_and_watches_show_models_that_are_allowed(locked: Locked) -> None:
    async with locked.api(await locked.key(models=("tiny", "none*"))) as api:
        listed = await api.models.ListModels(models_pb.ListModelsRequest(page_size=1))
        assert [model.name for model in listed.models] == ["tiny"]
        assert listed.next_page_token == ""
        watch = api.models.WatchModels(models_pb.WatchModelsRequest())
        assert (await watch.read()).status.name == "tiny"
        async with locked.api(await locked.key()) as other:
            await other.load("bear-demo")  # what happens to another one is not told
            await other.unload("bear-demo", 0)
            await other.load("tiny", pinned=True)
            await other.unload("tiny", 0)
            await other.load("tiny")
        seen = [(await watch.read()).status for _ in range(3)]
        assert {status.name for status in seen} == {"tiny"}
        watch.cancel()


async def test_similar_names_are_told_of_models_that_are_allowed(locked: Locked) -> None:
    for models, near in ((None, "tiny"), (("tinx", "other"), ""), (("tin*",), "tiny")):
        async with locked.api(await locked.key(models=models)) as api:
            told = await fails(api.once("tinx"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
            assert told.metadata["nearest"] == near
            assert ("tiny" in told.message) == bool(near)


# Requests


async def test_priority_above_the_keys_is_refused_and_none_is_lowered(locked: Locked) -> None:
    async with locked.api(await locked.key(priority=Priority.NORMAL)) as api:
        told = await fails(
            api.once("tiny", priority="high", max_tokens=1), Code.INVALID_ARGUMENT, "INVALID_FIELD"
        )
        assert told.fields == ["request.priority"] and "NORMAL" in told.message
        await api.once("tiny", priority="normal", max_tokens=1)
    async with locked.api(await locked.key(priority=Priority.LOW)) as api:
        told = await fails(
            api.once("tiny", priority="normal", max_tokens=1), Code.INVALID_ARGUMENT, "INVALID_FIELD"
        )
        assert "LOW" in told.message
        await api.once("tiny", max_tokens=1)


async def test_request_ids_are_each_callers_own(locked: Locked) -> None:
    async with locked.api(await locked.key()) as one, locked.api(await locked.key()) as two:
        running = one.generate("tiny", max_tokens=1900, ignore_eos=True, request_id="mine")
        await read_until(running, "started")
        await fails(one.once("tiny", request_id="mine"), Code.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
        other = two.generate("tiny", max_tokens=1, request_id="mine")
        assert (await read_until(other, "started"))[0].request_id == "mine"
        running.cancel()


# Keys that change


async def test_revocation_ends_what_runs_with_the_key_and_nothing_else(locked: Locked) -> None:
    leaked, kept = await locked.key(), await locked.key()
    async with locked.api(leaked) as thief, locked.api(kept) as owner:
        stream = thief.generate("tiny", max_tokens=1900, ignore_eos=True)
        watch = thief.models.WatchModels(models_pb.WatchModelsRequest())
        others = owner.models.WatchModels(models_pb.WatchModelsRequest())
        await read_until(stream, "started")
        await watch.read()
        await others.read()
        await locked.revoke(leaked)
        await stream_fails(stream, *REFUSED)
        await stream_fails(watch, *REFUSED)
        await others.read()
        others.cancel()
        await owner.idle("tiny")


async def test_expiry_ends_what_runs_with_the_key(locked: Locked) -> None:
    key = await locked.key(expires_s=time.time() + 3600)
    async with locked.api(key) as api:
        watch = api.models.WatchModels(models_pb.WatchModelsRequest())
        await watch.read()
        with sqlite3.connect(locked.store.file) as base:  # an hour later
            base.execute("UPDATE keys SET expires_s = ? WHERE id = ?", (time.time(), id_of(key)))
        base.close()
        await locked.refresh()
        await stream_fails(watch, *REFUSED)


async def test_keys_that_are_made_or_revoked_beside_the_server_count_at_once(locked: Locked) -> None:
    key, text = locked.store.create()
    async with locked.api(text) as api:

        async def counts() -> bool:
            return bool(await api.serving("models/tiny"))

        async def is_known() -> bool:
            return await reason(counts) == ""

        async def is_refused() -> bool:
            return await reason(counts) == "KEY_INVALID"

        await eventually(is_known)
        locked.store.revoke(key.id)
        await eventually(is_refused)


async def reason(call: Any) -> str:
    try:
        await call()
    except grpc.aio.AioRpcError as exc:
        info = details_pb.ErrorInfo()
        status = rpc_status.from_call(exc)  # type: ignore[arg-type]
        assert status is not None and status.details[0].Unpack(info)
        return info.reason
    return ""


async def test_keys_that_cannot_be_read_are_told_at_start(tmp_path: Path, spawner: Spawner) -> None:
    (tmp_path / FILE).write_bytes(b"no database, but long enough to be taken for one" * 40)
    config = ServerConfig(
        listen=[f"unix:{tmp_path}/bear.sock"], models_dir=tmp_path, state_dir=tmp_path, auth="keys"
    )
    server = Server(config, spawner)
    try:
        with pytest.raises(ConfigError, match=FILE):
            await server.start()
    finally:
        await server.stop(0)


# Failures


class Patient(Failures):
    """Every failure waits for longer than any test."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: list[str] = []

    def count(self, host: str) -> float:
        self.hosts.append(host)
        return 1000.0


async def test_failures_wait_and_valid_keys_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_SLOWED", 1)
    key_id, secret = new_id_and_secret()
    keys = Authenticator([Key(id=key_id, secret_sha256=digest_of(secret))])
    failures = Patient()
    server = grpc.aio.server(interceptors=[Calls(), Access(str, keys, failures)])
    server.add_generic_rpc_handlers((Counting(),))
    address = f"unix:{tmp_path}/slow.sock"
    server.add_insecure_port(address)
    await server.start()
    path = "/bear_grpc.v1.ModelService/ListModels"
    try:
        async with Api(address, key="wrong") as wrong, Api(address, key=text_of(key_id, secret)) as right:
            waiting = asyncio.ensure_future(wrong.calls.unary_unary(path)(b""))

            async def has_failed() -> bool:
                return failures.hosts == ["unix"]

            await eventually(has_failed)
            await right.calls.unary_unary(path)(b"")
            assert not waiting.done()
            # As many wait as may: the next one has its answer, which takes no room.
            await fails(wrong.calls.unary_unary(path)(b""), *REFUSED)
            assert failures.hosts == ["unix"] * 2
            waiting.cancel()
    finally:
        await server.stop(0)
