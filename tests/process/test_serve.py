"""`bear serve` as a process: its start, its signals, its end, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.processes import RunningServer, gone
from tests.helpers.rpc import WAIT_S, Api, Code, collect, fails, kinds, read_until

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ONE_THREAD = pb.LoadOptions(threads=1)


async def loaded(api: Api, path: Path) -> int:
    """Registers and loads a file as `steady`; gives its worker's id."""
    await api.register("steady", path, load_options=ONE_THREAD)
    return (await api.load("steady")).status.worker_process_id


async def watch_health(api: Api, service: str = "") -> Any:
    watch = api.health.Watch(health_pb2.HealthCheckRequest(service=service))
    await watch.read()
    return watch


async def told_not_serving(watch: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        assert (await watch.read()).status == NOT_SERVING


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
async def test_a_signal_lets_a_running_stream_finish_and_ends_with_zero(
    tmp_path: Path, steady_file: Path, number: signal.Signals
) -> None:
    async with RunningServer(tmp_path) as server:
        await server.ready()
        worker = await loaded(server.api, steady_file)
        stream = server.api.generate("steady", max_tokens=800, ignore_eos=True)
        await read_until(stream, "delta")
        health = await watch_health(server.api)
        server.terminate(number)
        await told_not_serving(health)
        events = await collect(stream)
        assert kinds(events)[-1] == "completed"
        assert events[-1].completed.usage.completion_token_count == 800
        assert await server.ended() == 0
        await gone(worker)
        assert server.errors() == []
        assert not server.socket_exists()


async def test_new_work_is_refused_while_the_server_stops(tmp_path: Path, steady_file: Path) -> None:
    async with RunningServer(tmp_path) as server, Api(server.target) as other:
        await server.ready()
        await loaded(server.api, steady_file)
        stream = server.api.generate("steady", max_tokens=1900, ignore_eos=True)
        await read_until(stream, "delta")
        health = await watch_health(server.api)
        server.terminate()
        await told_not_serving(health)
        for api in (server.api, other):
            for call in (api.once("steady", max_tokens=1), api.load("bear-demo")):
                assert (await fails(call, Code.UNAVAILABLE, "DRAINING")).retry is not None
            assert await api.serving("") == "NOT_SERVING"
            assert await api.serving("liveness") == "SERVING"
        stream.cancel()
        assert await server.ended() == 0


async def test_a_stream_beyond_the_grace_is_cut(tmp_path: Path, steady_file: Path) -> None:
    async with RunningServer(tmp_path, environ={"BEAR_STOP_GRACE_S": "0.2"}) as server:
        await server.ready()
        worker = await loaded(server.api, steady_file)
        stream = server.api.generate("steady", max_tokens=1900, ignore_eos=True)
        await read_until(stream, "delta")
        server.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            await collect(stream)
        assert caught.value.code() is Code.UNAVAILABLE  # type: ignore[attr-defined]
        assert await server.ended() == 0
        await gone(worker)


async def test_a_second_signal_ends_the_server_and_its_workers_at_once(
    tmp_path: Path, steady_file: Path
) -> None:
    async with RunningServer(tmp_path) as server:
        await server.ready()
        worker = await loaded(server.api, steady_file)
        stream = server.api.generate("steady", max_tokens=1900, ignore_eos=True)
        await read_until(stream, "delta")
        health = await watch_health(server.api)
        os.kill(worker, signal.SIGSTOP)  # the stream cannot finish
        server.terminate()
        await told_not_serving(health)
        began = time.monotonic()
        server.terminate()
        assert await server.ended() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5
        await gone(worker)


async def test_a_signal_during_the_first_load_ends_the_server(tmp_path: Path) -> None:
    async with RunningServer(tmp_path, "--load", "bear-demo") as server:
        # Health tells nothing before the load has ended, the model does.
        watch = server.api.models.WatchModels(models_pb.WatchModelsRequest(), wait_for_ready=True)
        async with asyncio.timeout(WAIT_S):
            while not (status := (await watch.read()).status).worker_process_id:
                pass
        os.kill(status.worker_process_id, signal.SIGSTOP)
        server.terminate()
        assert await server.ended() == 0
        await gone(status.worker_process_id)
        assert server.errors() == []


async def test_workers_do_not_outlive_a_killed_server(tmp_path: Path, steady_file: Path) -> None:
    async with RunningServer(tmp_path, "--load", "bear-demo") as server:
        await server.ready()
        workers = [await loaded(server.api, steady_file)]
        workers.append((await server.api.status("bear-demo")).worker_process_id)
        stream = server.api.generate("steady", max_tokens=1900, ignore_eos=True)
        await read_until(stream, "delta")
        server.terminate(signal.SIGKILL)
        assert await server.ended() == -signal.SIGKILL
        for worker in workers:
            await gone(worker)


async def test_the_server_stands_behind_its_workers(tmp_path: Path) -> None:
    async with RunningServer(tmp_path, "--load", "bear-demo") as server:
        await server.ready()
        worker = (await server.api.status("bear-demo")).worker_process_id
        assert psutil.Process(worker).nice() == psutil.Process().nice()
        assert psutil.Process(server.pid).nice() > psutil.Process(worker).nice()
        assert os.getpgid(worker) == worker
        assert psutil.Process(worker).ppid() == server.pid


async def test_a_port_in_use_ends_with_78_and_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with RunningServer(tmp_path, "--listen", address) as server:
            assert await server.ended() == 78
    # gRPC's own library may add a line of its own.
    (line,) = [line for line in server.lines if "bear_grpc" in line]
    assert address in line
    assert "in use" in line


async def test_a_port_of_another_server_is_in_use_too(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    async with RunningServer(tmp_path, "--listen", address, name="one") as first:
        await first.ready()
        async with RunningServer(tmp_path, "--listen", address, name="two") as second:
            assert await second.ended() == 78
        assert await first.api.serving("") == "SERVING"
        async with Api(address) as api:
            assert await api.serving("") == "SERVING"


async def test_an_unknown_model_to_load_ends_with_1_and_one_line(tmp_path: Path) -> None:
    async with RunningServer(tmp_path, "--load", "bear-dmo") as server:
        assert await server.ended() == 1
    (line,) = server.lines
    assert "bear-dmo" in line
    assert "bear-demo" in line
    assert "MODEL_NOT_FOUND" in line


async def test_a_bad_model_to_load_ends_with_1_and_its_cause(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "bad.gguf")
    async with RunningServer(tmp_path) as server:
        await server.ready()
        await server.api.register("bad", path)
        server.terminate()
        assert await server.ended() == 0
    os.truncate(path, 100)
    async with RunningServer(tmp_path, "--load", "bad") as server:
        assert await server.ended() == 1
    (line,) = server.errors()
    assert str(path) in line
    assert "MODEL_FILE_INVALID" in line


@pytest.mark.parametrize(
    ("args", "environ", "word"),
    [
        (["--config", "missing.toml"], {}, "missing.toml"),
        ([], {"BEAR_STALL_TIMEOUT_S": "-1"}, "stall_timeout_s"),
        ([], {"BEAR_LOG_LEVEL": "LOUD"}, "log_level"),
    ],
    ids=["file", "number", "choice"],
)
async def test_bad_settings_end_with_78_and_name_the_setting(
    tmp_path: Path, args: list[str], environ: dict[str, str], word: str
) -> None:
    async with RunningServer(tmp_path, *args, environ=environ) as server:
        assert await server.ended() == 78
    assert "Traceback" not in "\n".join(server.lines)
    assert word in server.lines[-1]


async def test_two_servers_share_a_models_folder(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf")
    async with RunningServer(tmp_path, name="one") as first:
        await first.ready()
        await first.api.register("shared", path, load_options=ONE_THREAD)
        await first.api.load("shared")
        async with RunningServer(tmp_path, name="two") as second:
            await second.ready()
            assert await second.api.state("shared") == "AVAILABLE"
            answers = [
                await api.once("shared", temperature=0, max_tokens=20) for api in (first.api, second.api)
            ]
            assert answers[0].choices[0].text == answers[1].choices[0].text
            pids = {(await api.status("shared")).worker_process_id for api in (first.api, second.api)}
            assert len(pids) == 2
            await second.api.unload("shared")
            await second.api.delete("shared")
            # What the first has loaded goes on.
            assert (await first.api.once("shared", max_tokens=1)).usage.completion_token_count == 1
            await first.api.unload("shared")
            await first.api.delete("shared")
            second.terminate()
            assert await second.ended() == 0
        first.terminate()
        assert await first.ended() == 0


# Root may read everything, unless it gives that up before the exec.
WITHOUT_OVERRIDE = (
    "import ctypes, os, sys\n"
    "prctl = ctypes.CDLL(None, use_errno=True).prctl\n"
    "PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2\n"
    "for cap in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):\n"
    "    assert prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0, ctypes.get_errno()\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
async def test_an_unreadable_file_is_refused_when_registered_and_when_loaded(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "model.gguf")
    locked = tmp_path / "locked"
    locked.mkdir()
    write_tiny_llama(locked / "model.gguf")
    locked.chmod(0)
    wrapper = (sys.executable, "-c", WITHOUT_OVERRIDE) if os.geteuid() == 0 else ()
    async with RunningServer(tmp_path, wrapper=wrapper) as server:
        api = (await server.ready()).api
        await api.register("good", path, load_options=ONE_THREAD)
        path.chmod(0)
        for call in (api.register("bad", path), api.load("good"), api.register("bad", locked / "model.gguf")):
            status = await fails(call, Code.FAILED_PRECONDITION, "MODEL_FILE_INVALID")
            assert "Permission denied" in status.metadata["problem"]
        path.chmod(0o600)
        assert (await api.once("good", max_tokens=1)).usage.completion_token_count == 1
        server.terminate()
        assert await server.ended() == 0
    locked.chmod(0o700)
