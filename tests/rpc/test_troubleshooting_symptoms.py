"""The symptoms of docs/troubleshooting.md that no reason tells of: brought about, looked at as it says."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from typer.testing import CliRunner

from bear_grpc.cli import app
from bear_grpc.client import AsyncClient, ServerUnreachable, Tls
from bear_grpc.config import ConfigError, ServerConfig
from bear_grpc.executor.spawner import Spawner
from bear_grpc.input_limits import InputLimits
from bear_grpc.transport import Listener
from bear_grpc.transport import Tls as TlsFiles
from bear_grpc.types import SandboxMode
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import server_service_pb2 as server_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.certificates import Authority
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import WAIT_S, Api, Code, ask, collect, kinds, read_until, serving, text_of
from tests.helpers.troubleshooting import SYMPTOMS, shows

pytestmark = pytest.mark.model


def check(title: str, lines: Iterable[str]) -> None:
    """The lines are the examples of an entry, in their order, whatever stands before them."""
    for example, line in zip(SYMPTOMS[title].examples, lines, strict=True):
        assert shows(f"…{example}", line), line


async def bear(api: Api, *args: str) -> str:
    """What a verb prints about a server."""
    call = asyncio.to_thread(CliRunner().invoke, app, ["--server", api.target, *args])
    result = await call
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
async def own(tmp_path: Path, spawner: Spawner, files: Path) -> AsyncIterator[Api]:
    """A server of the test's own."""
    async with serving(tmp_path, spawner, withdrawal_s=0.0, allow_path=[tmp_path, files]) as (_, api):
        yield api


def test_it_ends_with_exit_code_78(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bear.toml").write_text('lisen = ["127.0.0.1:50051"]\n')
    for args in (["config", "--check", "bear.toml"], ["serve", "--config", "bear.toml"]):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 78
        check("It ends with exit code 78", result.stderr.splitlines())


async def test_it_ends_with_exit_code_1(tmp_path: Path) -> None:
    async with RunningServer(tmp_path, "--load", "bear-dmo") as server:
        assert await server.ended() == 1
    check("It ends with exit code 1", server.errors())


def test_it_refuses_an_address_that_is_not_loopback() -> None:
    result = CliRunner().invoke(app, ["serve", "--listen", "0.0.0.0:50051"])
    assert result.exit_code == 78
    check("It refuses an address that is not loopback", result.stderr.splitlines())
    ServerConfig(listen=["0.0.0.0:50051"], insecure_public=True)
    ServerConfig(listen=[], listeners=[Listener("0.0.0.0:50053", serves="health")])


async def test_the_address_is_in_use(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path / "one", spawner, listen=["127.0.0.1:0"]) as (server, _):
        with pytest.raises(ConfigError) as caught:
            async with serving(tmp_path / "two", spawner, listen=server.addresses):
                pass
        check("The address is in use", [str(caught.value)])


async def test_health_stays_not_serving(own: Api) -> None:
    assert await own.serving("") == "SERVING"
    assert await own.serving("models/bear-demo") == "NOT_SERVING"
    await own.load("bear-demo")
    assert await own.serving("models/bear-demo") == "SERVING"
    assert "READY" in await bear(own, "ps")
    await own.server.Drain(server_pb.DrainRequest())
    assert [await own.serving(name) for name in ("", "liveness")] == ["NOT_SERVING", "SERVING"]


async def test_a_model_does_not_load(own: Api, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf")
    await own.register("m", path)
    os.truncate(path, 100)
    with pytest.raises(grpc.RpcError) as caught:
        await own.load("m")
    shown = await bear(own, "show", "m")
    assert "FAILED" in shown
    assert caught.value.details() in shown  # type: ignore[attr-defined]


async def test_workers_are_not_confined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spawner = Spawner(SandboxMode.OFF)
    try:
        async with serving(tmp_path, spawner) as (_, api):
            assert "sandbox" in await bear(api, "info")
    finally:
        spawner.close()
        spawner.join()
    told = [record.getMessage() for record in caplog.records if "CONFINED" in record.getMessage()]
    check("Workers are not confined", told)


async def test_where_the_logs_are(tmp_path: Path) -> None:
    environ = {"BEAR_LOG_FORMAT": "auto"}
    async with RunningServer(tmp_path, environ=environ) as server:
        await server.ready()
        answer = await server.api.once("bear-demo", max_tokens=1)
        with pytest.raises(grpc.RpcError):
            await server.api.once("bear-dmo")
        server.terminate()
        assert await server.ended() == 0
    log = (tmp_path / "state" / "logs" / "bear.log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["code"] for line in lines if line.get("id") == answer.request_id] == ["OK"]
    assert [line["code"] for line in lines if line.get("reason") == "MODEL_NOT_FOUND"] == ["NOT_FOUND"]


async def unreachable(address: str, tls: Tls | bool) -> str:
    """What a client says that gets no connection."""
    async with AsyncClient(address, tls=tls, timeout=WAIT_S) as client:
        with pytest.raises(ServerUnreachable) as caught:
            await client.server_info()
    return caught.value.message


async def test_no_server_answers(tmp_path: Path, spawner: Spawner) -> None:
    async with serving(tmp_path, spawner, listen=["127.0.0.1:0"]) as (server, _):
        address = server.addresses[0]
    check("No server answers", [await unreachable(address, False)])
    assert "No such file or directory" in await unreachable(f"unix:{tmp_path}/nobody", False)


async def test_a_tls_handshake_fails(tmp_path: Path, spawner: Spawner) -> None:
    authority, stranger = Authority(tmp_path / "authority"), Authority(tmp_path / "stranger")
    tls = TlsFiles(**authority.server())
    async with serving(tmp_path / "tls", spawner, listen=["127.0.0.1:0"], tls=tls) as (server, _):
        plain = await unreachable(server.addresses[0], False)
        untrusted = await unreachable(server.addresses[0], Tls(ca=stranger.file))
    async with serving(tmp_path / "plain", spawner, listen=["127.0.0.1:0"]) as (server, _):
        encrypted = await unreachable(server.addresses[0], True)
    check("A TLS handshake fails", [plain, encrypted, untrusted])


def test_grpcurl_finds_no_services() -> None:
    public = {"listen": ["0.0.0.0:50051"], "insecure_public": True}
    assert not ServerConfig(**public).with_reflection
    assert ServerConfig(**public, reflection=True).with_reflection
    assert ServerConfig(listen=["127.0.0.1:50051"]).with_reflection


async def test_a_code_without_a_reason(tmp_path: Path, spawner: Spawner) -> None:
    limits = InputLimits(max_message_bytes=4096)
    listeners = [Listener(f"unix:{tmp_path}/health.sock", serves="health")]
    async with serving(tmp_path, spawner, limits=limits, listeners=listeners) as (server, api):
        health = Api(server.addresses[1])
        request = inference_pb.CountTokensRequest(model="bear-demo", prompt="x" * 5000)
        metadata = (("x-much", "x" * 20_000),)
        status = inference_pb.CountTokensRequest(model="bear-demo", prompt="x")
        calls: list[tuple[Callable[[], Awaitable[Any]], grpc.StatusCode]] = [
            (lambda: api.inference.CountTokens(request), Code.RESOURCE_EXHAUSTED),
            (lambda: api.inference.CountTokens(status, metadata=metadata), Code.RESOURCE_EXHAUSTED),
            (lambda: health.inference.CountTokens(status), Code.UNIMPLEMENTED),
            (lambda: api.channel.unary_unary("/bear_grpc.v1.ModelService/Lod")(b""), Code.UNIMPLEMENTED),
            (lambda: api.inference.GenerateOnce(once_request(), timeout=0.001), Code.DEADLINE_EXCEEDED),
        ]
        for call, code in calls:
            with pytest.raises(grpc.RpcError) as caught:
                await call()
            assert caught.value.code() is code  # type: ignore[attr-defined]
            assert rpc_status.from_call(caught.value) is None  # type: ignore[arg-type]
        await health.channel.close()


def once_request() -> inference_pb.GenerateOnceRequest:
    return inference_pb.GenerateOnceRequest(request=ask("bear-demo"))


async def test_a_client_hangs(tmp_path: Path, tiny_file: Path, start: Callable[..., Spawner]) -> None:
    paced = start(module="tests.helpers.paced_worker")
    async with serving(tmp_path, paced, allow_path=[tiny_file.parent]) as (_, api):
        await api.register("m", tiny_file, load_options=pb.LoadOptions(max_sequences=1))
        events = await collect(api.generate("m", max_tokens=1, queue_progress=True))
        assert "model_progress" in kinds(events)
        running = api.inference.Generate(ask("m", max_tokens=1000, ignore_eos=True), timeout=1.5)
        await read_until(running, "delta")
        waiting = api.generate("m", max_tokens=1, queue_progress=True)
        await read_until(waiting, "queued")
        assert '"waiting_count": 1' in await bear(api, "ps", "--json")
        completed = (await collect(running))[-1].completed
        assert completed.finish_reason == inference_pb.FINISH_REASON_DEADLINE
        assert kinds(await collect(waiting))[-1] == "completed"


async def test_generation_is_slow(own: Api) -> None:
    await own.load("bear-demo")
    shown = await bear(own, "show", "bear-demo")
    assert all(f"{name}=" in shown for name in ("threads", "gpu_layers", "max_sequences"))
    assert "device CPU" in await bear(own, "info")
    assert "bear-demo" in await bear(own, "top")


async def test_tokens_but_no_text(api: Api, tiny: str, demo: str) -> None:
    (choice,) = (await api.once(tiny, logit_bias={2: 100.0}, max_tokens=8)).choices
    assert (choice.text, choice.stop_cause.eog_token) == ("", 2)
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}
    whole = (await api.once(demo, **options)).choices[0].text
    # What comes may be its beginning.
    stop = whole[10:20] + "#"
    events = await collect(api.generate(demo, stop=[stop], return_token_ids=True, **options))
    ahead, seen = [], [0, 0]
    for event in events:
        seen[0] += sum(len(token.piece) for token in event.delta.tokens)
        seen[1] += len(event.delta.text.encode())
        ahead.append(seen[0] - seen[1])
    assert max(ahead) > 0
    assert text_of(events) == whole


async def test_text_is_cut(api: Api, tiny: str) -> None:
    (choice,) = (await api.once(tiny, max_tokens=3, ignore_eos=True)).choices
    assert choice.finish_reason == inference_pb.FINISH_REASON_LENGTH
    whole = (await api.once(tiny, max_tokens=40, ignore_eos=True, temperature=0)).choices[0].text
    stop = whole[10:14]
    (choice,) = (await api.once(tiny, max_tokens=40, ignore_eos=True, temperature=0, stop=[stop])).choices
    assert choice.stop_cause.sequence == stop


async def test_memory_does_not_come_back(own: Api) -> None:
    await own.load("bear-demo")
    assert "WEIGHTS" in await bear(own, "ps", "--memory")
    assert "in all" in await bear(own, "info")
    assert "free again" in await bear(own, "stop", "bear-demo")


def test_every_symptom_is_tried() -> None:
    names = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_")}
    titles = {title.lower().replace(",", "").replace("_", " ") for title in SYMPTOMS}
    assert titles == names - {"every symptom is tried"}
