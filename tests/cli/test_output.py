"""Numbers, times and tables as people read them."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
import typer
from rich.console import Console

from bear_grpc.cli import output
from bear_grpc.cli.load_options import parse_keep_alive, parse_seconds


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


@pytest.mark.parametrize(
    ("away_s", "text"),
    [
        (-30, "now"),
        (0.5, "now"),
        (1, "1 second from now"),
        (119, "119 seconds from now"),
        (299, "4 minutes from now"),
        (7260, "2 hours from now"),
        (3 * 86_400, "3 days from now"),
    ],
)
def test_from_now(away_s: float, text: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert output.from_now(now + timedelta(seconds=away_s), now) == text


@pytest.mark.parametrize(("value", "text"), [(0.2, "1 s"), (25.6, "26 s"), (300, "5 min")])
def test_left(value: float, text: str) -> None:
    assert output.left(value) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("300", 300), ("5m", 300), ("1.5h", 5400), ("-1", -1), ("0", 0)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(("text", "seconds"), [("forever", -1), ("-1", -1), ("0", 0), ("5m", 300)])
def test_parse_keep_alive(text: str, seconds: float) -> None:
    assert parse_keep_alive(text) == seconds


@pytest.mark.parametrize("text", ["", "5 m", "m", "1w", "for ever"])
def test_what_is_no_time_is_bad_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_keep_alive(text)


def test_only_rows_that_stand_back_are_dim_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(output, "console", lambda: terminal)
    shown: list[str] = []
    monkeypatch.setattr(typer, "echo", lambda text, **_: shown.append(text))
    output.table(("NAME",), [("here",), ("away",)], dim={1})
    _, here, away = "".join(shown).splitlines()
    assert "\x1b[2m" not in here
    assert "\x1b[2m" in away
