"""What the verbs that talk to a server share: the options --server and --json, and the client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bear_grpc.client import Client, Tls

Server = Annotated[
    str | None,
    typer.Option("--server", metavar="ADDRESS", help="HOST:PORT or unix:PATH; the same as before the verb."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Model = Annotated[str, typer.Argument(help="Name or alias of the model.")]
ModelOrFile = Annotated[str, typer.Argument(help="Name or alias of the model, or a file on the hub.")]

# Where the key lies in the context, whose `meta` all verbs share.
API_KEY = "bear_grpc.api_key"
_TLS = "bear_grpc.tls"

# Longer than any honest answer of these calls takes.
_TIMEOUT_S = 30.0
# Of calls for which the server may have to ask the hub first: its own limits end them before.
HUB_TIMEOUT_S = 120.0


@contextmanager
def connect(ctx: typer.Context, server: str | None) -> Iterator[Client]:
    """The client of the server that is asked for; nothing is connected before the first call."""
    # gRPC's own log would stand between the lines on stderr; read when grpc is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from bear_grpc.client import DEFAULT_TARGET, Client

    try:
        tls = _tls(ctx)
        client = Client(
            server or ctx.obj or DEFAULT_TARGET, api_key=ctx.meta.get(API_KEY), timeout=_TIMEOUT_S, tls=tls
        )
    except (OSError, ValueError) as error:
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise typer.BadParameter(told) from None
    with client:
        yield client


def remember_tls(
    ctx: typer.Context, on: bool, ca: str | None, certificate: str | None, key: str | None
) -> None:
    """Keeps what the options before the verb say of TLS for `connect`."""
    ctx.meta[_TLS] = (on, ca, certificate, key)


def _tls(ctx: typer.Context) -> Tls | bool:
    from bear_grpc.client import Tls

    on, *files = ctx.meta.get(_TLS, (False, None, None, None))
    return Tls(*files) if any(files) else on
