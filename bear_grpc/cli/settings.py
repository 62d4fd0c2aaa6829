"""`bear config`, and how `bear serve` and it read the settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output

if TYPE_CHECKING:
    from bear_grpc.config import ConfigError

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Settings as TOML. Default: BEAR_CONFIG, else bear.toml in the user's configuration folder.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any setting, such as limits.max_answers=4; repeatable."
    ),
]


def config(
    config: ConfigFile = None,
    assignments: Assignments = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only tell what is wrong with this file; exit 78 if something is."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the settings that `bear serve` would have here, each with where it was told."""
    from bear_grpc.config import ConfigError, find_file, read_settings
    from bear_grpc.config.effective import to_json, to_toml

    try:
        if check is not None:
            read_settings(check, environ={})
            output.say(f"{check}: nothing is wrong")
            return
        settings = read_settings(find_file(config), texts=parse_assignments(assignments))
    except ConfigError as error:
        raise report_problems(error) from None
    if json:
        output.say(to_json(settings))
        return
    output.say(f"# file: {settings.file or 'none'}")
    output.say(to_toml(settings).rstrip())


def parse_assignments(texts: Sequence[str] | None) -> dict[str, str]:
    """Values by setting, of `NAME=VALUE`. Raises BadParameter."""
    values = {}
    for text in texts or ():
        name, is_there, value = text.partition("=")
        if not is_there:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="'--set'")
        values[name.strip()] = value
    return values


def report_problems(error: ConfigError) -> typer.Exit:
    """Prints every problem as a line; gives the exit to raise."""
    from bear_grpc.config import EXIT_CONFIG

    for problem in error.args:
        output.note(f"error: {problem}")
    return typer.Exit(EXIT_CONFIG)
