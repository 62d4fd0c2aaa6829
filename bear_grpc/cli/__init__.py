"""The command `bear`: parse, call, print; no logic of its own.

Answers go to stdout, everything else to stderr. Nothing here imports grpc before a verb needs it: help must
answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bear_grpc import __version__
from bear_grpc.cli import (
    audit,
    descriptors,
    drain,
    estimate,
    health,
    keys,
    load,
    models,
    output,
    pull,
    run,
    serve,
    session,
    settings,
    show,
    text,
    top,
    usage,
)
from bear_grpc.cli.advice import report
from bear_grpc.cli.session import API_KEY
from bear_grpc.errors import BearError

# As a shell says it of a process that the signal ended.
_EXIT_SIGINT, _EXIT_SIGPIPE = 130, 141


class _Bear(TyperGroup):
    """Where errors become lines on stderr and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone shows here at the latest
            return result
        except BearError as error:
            report(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_EXIT_SIGINT) from None
        except BrokenPipeError:
            output.abandon_stdout()
            raise typer.Exit(_EXIT_SIGPIPE) from None


app = typer.Typer(
    name="bear",
    cls=_Bear,
    help="Serves GGUF language models over gRPC, and talks to such a server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels cut long option names
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _globals(
    ctx: typer.Context,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            envvar="BEAR_SERVER",
            help="HOST:PORT, grpcs://HOST:PORT or unix:PATH of the server. Default: 127.0.0.1:50051.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="BEAR_API_KEY",
            help="Key for a server that asks for one; other users may see it here, but not in BEAR_API_KEY.",
        ),
    ] = None,
    tls: Annotated[
        bool,
        typer.Option("--tls", envvar="BEAR_SERVER_TLS", help="Use TLS; the same as grpcs:// in the address."),
    ] = False,
    tls_ca: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            envvar="BEAR_SERVER_CA",
            help="Use TLS, and trust the certificates that these (PEM) have signed.",
        ),
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            envvar="BEAR_CLIENT_CERTIFICATE",
            help="Use TLS with this client certificate (PEM).",
        ),
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(metavar="FILE", envvar="BEAR_CLIENT_KEY", help="Its private key (PEM).")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    ctx.obj = server
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise typer.BadParameter("the API key must be printable ASCII without spaces")
    ctx.meta[API_KEY] = api_key
    session.remember_tls(ctx, tls, tls_ca, tls_cert, tls_key)


app.command()(serve.serve)
app.command()(run.run)
app.command()(pull.pull)
app.command("list")(models.list_)
app.command()(models.ps)
app.command()(show.show)
app.command()(estimate.estimate)
app.command()(load.load)
app.command()(load.unload)
app.command("stop", help="The same as `unload`.")(load.unload)
app.command()(models.register)
app.command()(models.rm)
app.command()(models.prune)
app.command()(text.tokenize)
app.command("health")(health.health)
app.command()(health.info)
app.command()(drain.drain)
app.command()(settings.config)
app.command()(top.top)
app.command()(audit.audit)
app.command("usage")(usage.usage)
app.command()(descriptors.descriptors)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets "?", not a traceback.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # always text files here
    app(prog_name="bear")
