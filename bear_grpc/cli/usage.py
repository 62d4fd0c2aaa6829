"""`bear usage`: what keys used of models, from the state folder of the server on this machine."""

from __future__ import annotations

import json as json_text
import time
from enum import StrEnum
from typing import Annotated

import typer

from bear_grpc.cli import output
from bear_grpc.cli.keys import Config, StateDir, moment
from bear_grpc.cli.session import Json

# A caller without an id, and calls that got no model.
_NOBODY, _NO_MODEL = "anonymous", "none"


class By(StrEnum):
    """What sums are made of."""

    DAY = "day"
    KEY = "key"
    MODEL = "model"


def usage(
    by: Annotated[By, typer.Option(help="A line for each.")] = By.DAY,
    key: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only this key's, or that of anonymous callers: anonymous."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this model.")] = None,
    since: Annotated[
        str, typer.Option(metavar="WHEN", help="Only from that day on, UTC: 7d ago, or 2030-12-31.")
    ] = "30d",
    json: Json = False,
    state_dir: StateDir = None,
    config: Config = None,
) -> None:
    """Show how many requests and tokens were used."""
    from bear_grpc.access.usage import Totals, UsageError, UsageStore, day_of
    from bear_grpc.config import ConfigError, load_config

    first_day = day_of(max(0.0, moment(since, time.time(), ahead=False)))
    try:
        with UsageStore(load_config(config, {"state_dir": state_dir}).state_dir) as store:
            found = store.read(first_day, None if key is None else _id_of(key), model)
    except (ConfigError, UsageError) as error:
        output.note(f"error: {error}")
        raise typer.Exit(1) from None
    sums: dict[str, Totals] = {}
    for group, totals in found.items():
        names = {By.DAY: group.day, By.KEY: group.key_id or _NOBODY, By.MODEL: group.model or _NO_MODEL}
        name = names[by]
        sums[name] = sums.get(name, Totals()).plus(totals)
    if json:
        typer.echo(
            json_text.dumps([{by.value: name, **sums[name]._asdict()} for name in sorted(sums)], indent=2)
        )
        return
    numbers = ("REQUESTS", "PROMPT", "CACHED", "COMPLETION", "ERRORS")
    rows = [(name, *(str(number) for number in sums[name])) for name in sorted(sums)]
    output.table((by.value.upper(), *numbers), rows, right=numbers)
    if not sums:
        output.note(f"nothing was used since {first_day}")


def _id_of(text: str) -> str:
    """A key's id by itself or in a whole key; names of client certificates as they are."""
    from bear_grpc.access.key import id_of

    return "" if text == _NOBODY else id_of(text) or text
