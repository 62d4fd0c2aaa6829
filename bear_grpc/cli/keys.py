"""`bear keys`: makes, lists and revokes API keys, in the state folder of the server on this machine."""

from __future__ import annotations

import json as json_text
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bear_grpc.cli import output
from bear_grpc.cli.session import Json

if TYPE_CHECKING:
    from bear_grpc.access.key import Key
    from bear_grpc.access.keys import KeyStore

app = typer.Typer(
    help="API keys of the server on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_QUOTAS = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "concurrent_streams": "streams",
    "tokens_per_day": "tokens/day",
}

StateDir = Annotated[
    str | None, typer.Option("--state-dir", metavar="DIR", help="As the server's. Default: its default.")
]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="The server's settings.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `bear keys list` shows it.")]
Count = Annotated[int | None, typer.Option(min=1, metavar="N")]


class ScopeName(StrEnum):
    """What a key may be for; the values of `access.caller.Scope`."""

    INFER = "infer"
    MODELS_READ = "models:read"
    MODELS_ADMIN = "models:admin"
    SERVER_ADMIN = "server:admin"


class PriorityName(StrEnum):
    """Priorities by name."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Whose key it is; for people.")] = "",
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(
            metavar="SCOPE",
            help="infer, models:read, models:admin or server:admin; repeatable. Default: the first two.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only models of these names, as in llama-*; repeatable."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="After 12h, 30d or 8w, or on a date: 2030-12-31.")
    ] = None,
    priority: Annotated[
        PriorityName, typer.Option(help="The most urgent that its requests may be.")
    ] = PriorityName.HIGH,
    requests_per_minute: Count = None,
    tokens_per_minute: Count = None,
    concurrent_streams: Count = None,
    tokens_per_day: Count = None,
    json: Json = False,
    state_dir: StateDir = None,
    config: Config = None,
) -> None:
    """Make a key. It is shown this once: only a hash of it is kept."""
    from bear_grpc.access.caller import Quotas, Scope
    from bear_grpc.access.key import DEFAULT_SCOPES
    from bear_grpc.params import Priority

    quotas = Quotas(requests_per_minute, tokens_per_minute, concurrent_streams, tokens_per_day)
    with _store(state_dir, config) as store:
        key, text = store.create(
            name=name,
            scopes=frozenset(Scope(each) for each in scope) if scope else DEFAULT_SCOPES,
            models=tuple(model) if model else None,
            priority=Priority[priority.name],
            quotas=quotas,
            expires_s=None if expires is None else moment(expires, time.time()),
        )
        _record(store, "CreateKey", key.id)
    if json:
        typer.echo(json_text.dumps({"key": text, **_as_json(key)}, indent=2))
        return
    output.say(text)
    output.note(f"key {key.id}{f' of {name}' if name else ''}: {_told(key)}")
    output.note("it is not shown again; clients take it from BEAR_API_KEY")


@app.command("list")
def list_(
    all_: Annotated[bool, typer.Option("--all", "-a", help="Those too that are revoked or expired.")] = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: Config = None,
) -> None:
    """List the keys."""
    with _store(state_dir, config) as store:
        known = store.all()
    now_s = time.time()
    shown = [key for key in known if all_ or key.state(now_s) == "active"]
    if json:
        typer.echo(json_text.dumps([_as_json(key) for key in shown], indent=2))
        return
    output.table(
        ("ID", "NAME", "STATE", "SCOPES", "MODELS", "PRIORITY", "EXPIRES"),
        (
            (
                key.id,
                key.name,
                key.state(now_s),
                " ".join(sorted(key.scopes)),
                "all" if key.models is None else " ".join(key.models),
                key.priority.name.lower(),
                _date(key.expires_s) or "never",
            )
            for key in shown
        ),
        dim={place for place, key in enumerate(shown) if key.state(now_s) != "active"},
    )
    if known and not shown:
        output.note(f"no key is valid; `bear keys list --all` shows {len(known)} that were")


@app.command()
def show(
    key: KeyId,
    json: Json = False,
    state_dir: StateDir = None,
    config: Config = None,
) -> None:
    """Show one key, but for its secret."""
    with _store(state_dir, config) as store:
        found = _found(store, key)
    if json:
        typer.echo(json_text.dumps(_as_json(found), indent=2))
        return
    limits = {label: getattr(found.quotas, field) for field, label in _QUOTAS.items()}
    output.fields(
        (
            ("id", found.id),
            ("name", found.name),
            ("state", found.state(time.time())),
            ("scopes", ", ".join(sorted(found.scopes))),
            ("models", "all" if found.models is None else ", ".join(found.models)),
            ("priority", f"up to {found.priority.name.lower()}"),
            *((label, f"{value:,}") for label, value in limits.items() if value is not None),
            ("created", _date(found.created_s)),
            ("expires", _date(found.expires_s) or "never"),
            ("revoked", _date(found.revoked_s)),
        )
    )


@app.command()
def revoke(
    keys: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of keys, or whole keys.")],
    state_dir: StateDir = None,
    config: Config = None,
) -> None:
    """Make keys invalid for good. The server ends their calls within about a second."""
    with _store(state_dir, config) as store:
        for found in [_found(store, key) for key in keys]:
            done = store.revoke(found.id)
            if done:
                _record(store, "RevokeKey", found.id)
            output.say(f"{found.id} is revoked" if done else f"{found.id} was revoked before")


@contextmanager
def _store(state_dir: str | None, config: Path | None) -> Iterator[KeyStore]:
    """The keys of the server with these settings; what goes wrong with them is told, and ends the verb."""
    from bear_grpc.access.keys import KeyStore, KeyStoreError
    from bear_grpc.config import ConfigError, load_config

    try:
        with KeyStore(load_config(config, {"state_dir": state_dir}).state_dir) as store:
            yield store
    except (ConfigError, KeyStoreError) as error:
        output.note(f"error: {error}")
        raise typer.Exit(1) from None


def _record(store: KeyStore, action: str, key_id: str) -> None:
    """Into the audit log; the key is changed already, so an error is only told."""
    from pwd import getpwuid

    from bear_grpc.access.audit import Entry, append

    try:
        name = getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    try:
        append(store.file.parent, Entry(action, actor=f"os:{name}", subjects=(key_id,)))
    except OSError as error:
        output.note(f"warning: not in the audit log: {error}")


def _found(store: KeyStore, text: str) -> Key:
    from bear_grpc.access.key import id_of

    key_id = id_of(text)
    found = None if key_id is None else store.get(key_id)
    if found is None:
        # What was given may be a whole key, which has no place in a log.
        output.note(f"error: there is no key {key_id}" if key_id else "error: that is no id of a key")
        raise typer.Exit(1)
    return found


def moment(text: str, now_s: float, *, ahead: bool = True) -> float:
    """Seconds since 1970 of a time from now, or ago, or of the begin of a day, UTC. Raises BadParameter."""
    if match := re.fullmatch(r"(\d{1,6})([smhdw])", text):
        return now_s + (1 if ahead else -1) * int(match[1]) * _UNITS_S[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a time such as 30d nor a date such as 2030-12-31"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _when(seconds: float) -> datetime:
    from bear_grpc.access.key import MAX_TIME_S

    return datetime.fromtimestamp(min(seconds, MAX_TIME_S), UTC)  # keys of before there was a limit


def _date(seconds: float | None) -> str:
    return "" if seconds is None else _when(seconds).strftime("%Y-%m-%d %H:%M UTC")


def _told(key: Key) -> str:
    scopes = ", ".join(sorted(key.scopes))
    models = "all models" if key.models is None else f"models {', '.join(key.models)}"
    expires = f"expires {_date(key.expires_s)}" if key.expires_s is not None else "never expires"
    return f"{scopes}; {models}; priority up to {key.priority.name.lower()}; {expires}"


def _as_json(key: Key) -> dict[str, Any]:
    """All that is kept, but for the hash; times as ISO 8601."""
    times = {name: getattr(key, f"{name}_s") for name in ("created", "expires", "revoked")}
    return {
        "id": key.id,
        "name": key.name,
        "state": key.state(time.time()),
        "scopes": sorted(key.scopes),
        "models": None if key.models is None else list(key.models),
        "priority": key.priority.name.lower(),
        "quotas": {field: getattr(key.quotas, field) for field in _QUOTAS},
        **{name: None if seconds is None else _when(seconds).isoformat() for name, seconds in times.items()},
    }
