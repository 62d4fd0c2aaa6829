"""What people and programs read: tables, lines and JSON.

What a server sends is not to be trusted by a terminal: control characters are taken out before it is shown.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from io import UnsupportedOperation
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console

    from bear_grpc.v1.types_pb2 import MemoryLedger

_TIME_UNITS = (("day", 86_400), ("hour", 3600), ("minute", 60))
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Text without what could steer a terminal; newlines and tabs stay."""
    return _CONTROL.sub("", text)


def note(line: str) -> None:
    """A line on stderr."""
    typer.echo(printable(line), err=True)


def say(line: str) -> None:
    """A line of the answer, on stdout."""
    typer.echo(printable(line))


def abandon_stdout() -> None:
    """Points stdout nowhere: what is still buffered would fail again at exit."""
    with suppress(UnsupportedOperation):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(message: Message) -> None:
    """A protobuf message as JSON, with the contract's field names."""
    from google.protobuf.json_format import MessageToJson

    # Fields at 0 are written too: a program should not have to know which ones are.
    typer.echo(
        MessageToJson(
            message,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
            ensure_ascii=False,
        )
    )


def console(*, stderr: bool = False) -> Console:
    """A console on today's stdout or stderr."""
    from rich.console import Console

    file = sys.stderr if stderr else sys.stdout
    # Where no person looks, lines are as long as they are: a cut cell could not be read by a program.
    return Console(file=file, markup=False, highlight=False, width=None if file.isatty() else 10_000)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    dim: Container[int] = (),
) -> None:
    """A table on stdout; the columns in `right` are numbers, the rows numbered in `dim` stand back."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        # The name is what a person copies: it is never cut, others give way.
        grid.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    grid.columns[0].overflow = "fold"
    for place, row in enumerate(rows):
        grid.add_row(*(Text(printable(cell)) for cell in row), style="dim" if place in dim else None)
    shown = console()
    with shown.capture() as lines:  # rich itself would end the process when the reader has gone
        shown.print(grid)
    typer.echo(lines.get(), nl=False)


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values on stdout, one pair a line; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        say(f"{name:<{width}}  {value}")


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def memory_bytes(memory: MemoryLedger) -> int:
    """What a loaded model takes: its process, or where the system does not tell, its parts."""
    return memory.process_bytes or memory.weights_bytes + memory.kv_cache_bytes + memory.compute_bytes


def amount(count: int) -> str:
    """A count as a person reads it: 124M, 7.2B."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return str(count)


def seconds(value: float) -> str:
    """A duration as a person reads it."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    hours, rest = divmod(round(value), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min"


def left(value: float) -> str:
    """A time that is predicted: no finer than a second."""
    return f"{max(1, round(value))} s" if value < 120 else seconds(value)


def from_now(value: datetime, now: datetime | None = None) -> str:
    """How far a moment (UTC) lies ahead, in whole units: "4 minutes from now"; "now" when it has come."""
    away = int((value - (now or datetime.now(UTC))).total_seconds())
    if away < 1:
        return "now"
    # Two units at least, as one alone could be half of it off.
    fitting = ((name, length) for name, length in _TIME_UNITS if away >= 2 * length)
    name, length = next(fitting, ("second", 1))
    count = away // length
    return f"{count} {name}{'s' if count > 1 else ''} from now"
