"""`bear tokenize`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bear_grpc.cli import output
from bear_grpc.cli.session import Json, Model, Server, connect


def tokenize(
    ctx: typer.Context,
    model: Model,
    text: Annotated[str | None, typer.Argument(help="Default: stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="As a user's message in the chat template.")] = False,
    special: Annotated[
        bool | None, typer.Option(help="Add tokens such as BOS where the model wants them.")
    ] = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Recognise control tokens written in the text.")
    ] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """Show the tokens of a text: the id and the bytes of each."""
    given = read_stdin("TEXT") if text is None else text
    with connect(ctx, server) as client:
        response = client.tokenize(
            model,
            None if chat else given,
            messages=[{"role": "user", "content": given}] if chat else None,
            add_special=special,
            parse_special=parse_special,
            include_pieces=True,
        )
    if json:
        output.print_json(response)
        return
    for token_id, piece in zip(response.token_ids, response.pieces, strict=True):
        # As a literal, so that spaces and half characters show.
        shown = piece.decode("utf-8", "backslashreplace")
        output.say(f"{token_id:>8}  {shown!r}")
    output.note(f"{len(response.token_ids)} tokens")


def read_stdin(argument: str) -> str:
    """The text that is piped in, without the newline that ends it."""
    if sys.stdin.isatty():
        raise typer.BadParameter(f"give {argument}, or pipe it in")
    try:
        text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"stdin is no UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text:
        raise typer.BadParameter(f"stdin is empty; give {argument}, or pipe it in")
    return text
