"""`bear top`: one reading as a person sees it, at 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bear_grpc.cli.top import picture
from bear_grpc.v1 import types_pb2 as pb
from bear_grpc.v1.server_service_pb2 import ModelLoad, ServerLoad
from tests.cli.conftest import Bear
from tests.client import samples
from tests.client.fake_server import FakeServer

BUSY = ModelLoad(
    name="bear-demo",
    running_count=3,
    waiting_count=1,
    slot_count=4,
    kv_cache_used_token_count=4096,
    kv_cache_token_count=8192,
    prefill_tokens_per_second=640.4,
    decode_tokens_per_second=120.6,
    memory_bytes=48 << 20,
    utilization=1.0,
)
LOAD = ServerLoad(
    running_count=3,
    waiting_count=1,
    slot_count=4,
    tokens_per_second=120.6,
    prefill_tokens_per_second=640.4,
    requests_per_second=2.5,
    memory_bytes=48 << 20,
    utilization=1.0,
    models=[BUSY],
)


def drawn(load: ServerLoad, models: list[pb.Model]) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(picture(load, models, 80))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_nothing_is_loaded() -> None:
    assert drawn(ServerLoad(), []) == [
        "0/0 running   0 waiting   0.0 requests/s   0 B",
        "prefill 0 tokens/s   decode 0 tokens/s   utilization 0%",
        "",
        "no model is loaded",
    ]


def test_one_model() -> None:
    assert drawn(LOAD, [samples.DEMO]) == [
        "3/4 running   1 waiting   2.5 requests/s   48.0 MiB",
        "prefill 640 tokens/s   decode 121 tokens/s   utilization 100%",
        "",
        "MODEL     STATE RUN WAIT PREFILL DECODE KV            MEMORY",
        "bear-demo READY 3/4    1   640/s  121/s ███░░░  50% 48.0 MiB",
    ]


@pytest.mark.parametrize("name", ["model", "a-model-with-a-name-that-is-longer-than-a-line-" * 3])
def test_many_models_keep_a_line_each_and_their_numbers(name: str) -> None:
    full = {"slot_count": 64, "running_count": 64, "waiting_count": 9999, "memory_bytes": 1001 << 30}
    full |= {"prefill_tokens_per_second": 99_999, "decode_tokens_per_second": 9_999}
    loads = [ModelLoad(name=f"{place:02}-{name}", **full) for place in range(30)]
    lines = drawn(ServerLoad(models=loads), [])
    assert len(lines) == 4 + 30
    assert all(
        len(line) <= 80 and "64/64 9999 99999/s 9999/s ░░░░░░   0% 1001 GiB" in line for line in lines[4:]
    )


def test_a_model_that_loads_has_a_state_and_no_numbers() -> None:
    [*_, line] = drawn(ServerLoad(), [pb.Model(name="bear-demo", status=samples.LOADING)])
    assert line.split()[:2] == ["bear-demo", "LOADING"]


def test_a_name_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in "".join(drawn(ServerLoad(models=[ModelLoad(name="a\x1b[2Jb[bold]")]), []))


def test_without_a_terminal_it_shows_one_reading(bear: Bear, server: FakeServer) -> None:
    server.models = [samples.DEMO, samples.TINY, samples.PLAIN]
    result = bear("top")
    assert result.exit_code == 0
    assert result.stdout.startswith("2/0 running")
    assert "bear-demo" in result.stdout
    assert "plain" not in result.stdout
