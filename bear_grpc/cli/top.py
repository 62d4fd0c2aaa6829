"""`bear top`: what the server does, live."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output, words
from bear_grpc.cli.session import Server, connect

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from bear_grpc.client import Client
    from bear_grpc.v1.server_service_pb2 import ModelLoad, ServerLoad
    from bear_grpc.v1.types_pb2 import Model

# Below this width bars and states are short, so that names and numbers have room.
_WIDE = 100
# What the numbers of a line take at most, without the bar.
_NUMBERS = 46
# Models that are not loaded change seldom.
_MODELS_EVERY_S = 3.0
_RETRY_S = 1.0
_KEYS_EVERY_S = 0.2


def top(
    ctx: typer.Context,
    interval: Annotated[
        float, typer.Option(min=0.1, max=60, metavar="SECONDS", help="Time between two readings.")
    ] = 1.0,
    server: Server = None,
) -> None:
    """Show what the server does, live; q ends it. Where no terminal is, it shows one reading."""
    with connect(ctx, server) as client:
        if sys.stdout.isatty():
            _watch(client, interval)
            return
        shown = output.console()
        with shown.capture() as lines:  # rich itself would end the process when the reader has gone
            shown.print(picture(client.get_load().load, _working(client), shown.width))
        typer.echo(lines.get(), nl=False)


def _watch(client: Client, interval_s: float) -> None:
    """Until q or Ctrl-C. A server that has gone is waited for; raises what else ends a call."""
    from rich.live import Live
    from rich.text import Text

    from bear_grpc.client import ServerUnreachable
    from bear_grpc.errors import Draining

    try:
        with _quit_key(), Live(console=output.console(), screen=True, auto_refresh=False) as live:
            while True:
                models: list[Model] = []
                read_s = -_MODELS_EVERY_S
                try:
                    # The stream outlives the time limit of other calls.
                    for reading in client.watch_load(interval_s):
                        if time.monotonic() - read_s >= _MODELS_EVERY_S:
                            models, read_s = _working(client), time.monotonic()
                        live.update(picture(reading.load, models, live.console.width), refresh=True)
                except (ServerUnreachable, Draining):
                    live.update(Text("the server is gone; waiting for it", style="yellow"), refresh=True)
                time.sleep(_RETRY_S)
    except KeyboardInterrupt:
        return


def _working(client: Client) -> list[Model]:
    """The models that have a state worth a line: those that are loaded, or on their way."""
    from bear_grpc.v1 import types_pb2 as pb

    quiet = {pb.MODEL_STATE_UNSPECIFIED, pb.MODEL_STATE_AVAILABLE, pb.MODEL_STATE_ABSENT}
    return [
        model
        for model in client.list_models()
        if model.status.state not in quiet or model.status.HasField("pull")
    ]


@contextmanager
def _quit_key() -> Iterator[None]:
    """Within it q on the terminal is as good as Ctrl-C."""
    if not sys.stdin.isatty():
        yield
        return
    import select
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if not select.select([fd], [], [], _KEYS_EVERY_S)[0]:
                continue
            key = os.read(fd, 1)
            if key in (b"q", b"Q"):
                os.kill(os.getpid(), signal.SIGINT)
            if not key:
                return

    tty.setcbreak(fd)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        done.set()
        reader.join()
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def picture(load: ServerLoad, models: Sequence[Model], width: int) -> RenderableType:
    """One reading, `width` columns wide, with the states of the models as they were last told."""
    from rich.console import Group
    from rich.text import Text

    loads = {each.name: each for each in load.models}
    states = {model.name: words.state(model.status) for model in models}
    names = sorted({*loads, *states})
    head = (
        f"{load.running_count}/{load.slot_count} running   {load.waiting_count} waiting   "
        f"{load.requests_per_second:.1f} requests/s   {output.size(load.memory_bytes)}",
        f"prefill {load.prefill_tokens_per_second:.0f} tokens/s   "
        f"decode {load.tokens_per_second:.0f} tokens/s   utilization {load.utilization:.0%}",
    )
    below: RenderableType = Text("no model is loaded", style="dim")
    if names:
        below = _table([(name, states.get(name, "ready"), loads.get(name)) for name in names], width)
    return Group(*(Text(line, style="bold") for line in head), Text(""), below)


def _table(rows: Sequence[tuple[str, str, ModelLoad | None]], width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    bar, state_width = (10, 24) if width >= _WIDE else (6, 9)
    name_width = max(8, width - _NUMBERS - bar - state_width)
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    grid.add_column("MODEL", no_wrap=True, overflow="ellipsis", max_width=name_width)
    grid.add_column("STATE", no_wrap=True, overflow="ellipsis", max_width=state_width)
    for column in ("RUN", "WAIT", "PREFILL", "DECODE"):
        grid.add_column(column, justify="right", no_wrap=True)
    grid.add_column("KV", no_wrap=True)
    grid.add_column("MEMORY", justify="right", no_wrap=True)
    for name, state, load in rows:
        told = () if load is None else _cells(load, bar)
        grid.add_row(
            Text(output.printable(name)), Text(output.printable(state)), *(Text(cell) for cell in told)
        )
    return grid


def _cells(load: ModelLoad, bar: int) -> tuple[str, ...]:
    part = load.kv_cache_used_token_count / load.kv_cache_token_count if load.kv_cache_token_count else 0.0
    full = min(bar, round(part * bar))
    return (
        f"{load.running_count}/{load.slot_count}",
        str(load.waiting_count),
        f"{load.prefill_tokens_per_second:.0f}/s",
        f"{load.decode_tokens_per_second:.0f}/s",
        f"{'█' * full}{'░' * (bar - full)} {part:4.0%}",
        output.size(load.memory_bytes),
    )
