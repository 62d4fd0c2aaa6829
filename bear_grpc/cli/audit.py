"""`bear audit`: shows and checks the audit log of the server on this machine."""

from __future__ import annotations

import json as json_text
import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from bear_grpc.cli import output
from bear_grpc.cli.keys import Config, StateDir, moment
from bear_grpc.cli.session import Json


def audit(
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Only from then on: 12h or 30d ago, or 2030-12-31.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check that no line was changed.")] = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: Config = None,
) -> None:
    """Show who loaded, removed and pulled models, drained the server and changed keys."""
    from bear_grpc.access.audit import check, entry_of, lines
    from bear_grpc.access.refusals import ACTION as REFUSED
    from bear_grpc.config import ConfigError, load_config

    from_s = 0.0 if since is None else moment(since, time.time(), ahead=False)
    try:
        found = lines(load_config(config, {"state_dir": state_dir}).state_dir)
    except (ConfigError, OSError) as error:
        output.note(f"error: {error}")
        raise typer.Exit(1) from None
    if verify:
        checked = check(found)
        if json:
            told = {"lines": checked.line_count, "last": checked.last_hash, "problems": checked.problems}
            typer.echo(json_text.dumps(told, indent=2))
        else:
            output.say(f"{checked.line_count} lines, the last has SHA-256 {checked.last_hash}")
        for problem in checked.problems:
            output.note(f"error: {problem}")
        if checked.problems:
            raise typer.Exit(1)
        return
    entries = [entry for line in found if (entry := entry_of(line)) is not None and entry.time_s >= from_s]
    if json:
        from msgspec import to_builtins

        typer.echo(json_text.dumps([to_builtins(entry) for entry in entries], indent=2))
        return
    output.table(
        ("TIME", "ACTION", "SUBJECT", "WHO", "FROM", "OUTCOME"),
        (
            (
                datetime.fromtimestamp(entry.time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
                entry.action,
                f"{entry.count} more" if entry.action == REFUSED else " ".join(entry.subjects),
                entry.actor or entry.tenant,
                entry.peer,
                f"{entry.code} {entry.reason}".strip(),
            )
            for entry in entries
        ),
    )
