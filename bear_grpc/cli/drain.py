"""`bear drain`."""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer

from bear_grpc.cli import output
from bear_grpc.cli.session import Json, Server, connect

_EVERY_S = 0.5


def drain(
    ctx: typer.Context,
    wait: Annotated[bool, typer.Option("--wait", help="Return when nothing is running any more.")] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """Let the server take no new work. What runs goes on, and the server does not end by itself."""
    with connect(ctx, server) as client:
        # It answers after the server's pause, however long that is.
        response = client.drain(timeout=math.inf)
        while True:
            if not json:
                output.note(_told(response.remaining_count))
            if not wait or response.remaining_count == 0:
                break
            seen = response.remaining_count
            while response.remaining_count == seen:
                time.sleep(_EVERY_S)
                response = client.drain(timeout=math.inf)
    if json:
        output.print_json(response)


def _told(count: int) -> str:
    what = "1 request is" if count == 1 else f"{count or 'no'} requests are"
    return f"the server takes no new work, {what} left"
