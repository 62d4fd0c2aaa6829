"""Numbers as people read them, and the bar of a load."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from bear_grpc.cli import output
from bear_grpc.cli.load import _watching, parse_seconds
from bear_grpc.cli.progress import LoadBar
from bear_grpc.client import Client
from bear_grpc.v1 import types_pb2 as types
from tests.client.fake_server import FakeServer


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (1 << 41, "2.0 TiB")],
)
def test_size(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (124_000_000, "124M"), (7_240_000_000, "7.24B")])
def test_amount(count: int, text: str) -> None:
    assert output.amount(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.052, "52 ms"), (1.25, "1.2 s"), (300, "5 min"), (7260, "2 h 1 min")]
)
def test_seconds(value: float, text: str) -> None:
    assert output.seconds(value) == text


def test_moment() -> None:
    now = datetime.now(UTC)
    assert output.moment(now + timedelta(minutes=10, seconds=30)) == "in 10 min"
    assert output.moment(now - timedelta(minutes=10, seconds=30)) == "10 min ago"


@pytest.mark.parametrize(
    ("text", "seconds"), [("300", 300), ("5m", 300), ("1.5h", 5400), ("-1", -1), ("0", 0)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


def loading(fraction: float) -> types.ModelStatus:
    progress = types.LoadProgress(stage=types.LOAD_STAGE_WEIGHTS, fraction=fraction)
    return types.ModelStatus(name="m", state=types.MODEL_STATE_LOADING, load_progress=progress)


def test_load_bar_shows_stage_and_fraction_on_a_terminal() -> None:
    screen = io.StringIO()
    with LoadBar(Console(file=screen, force_terminal=True, force_interactive=True, width=100)) as bar:
        bar.update(loading(0.45))
    assert "m: reading the weights" in screen.getvalue()
    assert "45%" in screen.getvalue()


def test_load_bar_writes_nothing_elsewhere() -> None:
    file = io.StringIO()
    with LoadBar(Console(file=file)) as bar:
        bar.update(loading(0.45))
    assert file.getvalue() == ""


def test_a_load_is_watched_while_it_lasts(server: FakeServer) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    with Client(server.target) as client, LoadBar(console) as bar, _watching(client, "bear-demo", bar):
        assert server.watched.wait(10)
