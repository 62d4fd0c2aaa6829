"""`bear keys`, and the key that every verb shows."""

from __future__ import annotations

import json
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bear_grpc.access.caller import Quotas, Scope
from bear_grpc.access.key import DEFAULT_SCOPES, id_of, parse
from bear_grpc.access.keys import FILE, KeyStore
from bear_grpc.cli import app
from bear_grpc.cli.keys import PriorityName, ScopeName
from bear_grpc.errors import KeyMissing, ModelDenied
from bear_grpc.params import Priority
from tests.client.fake_server import FakeServer, Refusal


class KeysVerb:
    """Runs `bear keys` on a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *args: str) -> Result:
        environ = {"BEAR_STATE_DIR": str(self.folder)}
        return CliRunner().invoke(app, ["keys", *args], prog_name="bear", env=environ, catch_exceptions=False)

    def made(self, *args: str) -> dict[str, Any]:
        result = self("create", "--json", *args)
        assert (result.exit_code, result.stderr) == (0, "")
        return json.loads(result.stdout)  # type: ignore[no-any-return]


@pytest.fixture
def keys(tmp_path: Path) -> KeysVerb:
    return KeysVerb(tmp_path / "state")


def test_create_prints_the_key_alone_and_keeps_what_was_chosen(keys: KeysVerb) -> None:
    result = keys(
        *("create", "--name", "ci", "--scope", "infer", "--scope", "models:admin"),
        *("--model", "tiny*", "--model", "bear-demo", "--expires", "30d", "--priority", "low"),
        *("--requests-per-minute", "1", "--tokens-per-minute", "2"),
        *("--concurrent-streams", "3", "--tokens-per-day", "4"),
    )
    assert result.exit_code == 0
    text = result.stdout.removesuffix("\n")
    parsed = parse(text)
    assert parsed is not None
    assert parsed[1] not in result.stderr
    with KeyStore(keys.folder) as store:
        [key] = store.all()
    assert (key.id, key.name, key.scopes) == (parsed[0], "ci", {Scope.INFER, Scope.MODELS_ADMIN})
    assert (key.models, key.priority, key.quotas) == (
        ("tiny*", "bear-demo"),
        Priority.LOW,
        Quotas(1, 2, 3, 4),
    )
    assert key.expires_s == pytest.approx(time.time() + 30 * 86_400, abs=60)


def test_create_without_options_may_infer_and_read(keys: KeysVerb) -> None:
    made = keys.made()
    assert made["scopes"] == sorted(DEFAULT_SCOPES)
    assert (made["models"], made["priority"], made["expires"]) == (None, "high", None)
    assert set(made["quotas"].values()) == {None}
    assert id_of(made["key"]) == made["id"]


@pytest.mark.parametrize(
    ("given", "ahead"),
    [("90s", 90), ("5m", 300), ("12h", 43_200), ("8w", 4_838_400)],
)
def test_expiry_is_a_time_from_now(keys: KeysVerb, given: str, ahead: int) -> None:
    expires = datetime.fromisoformat(keys.made("--expires", given)["expires"])
    assert abs(expires - datetime.now(UTC) - timedelta(seconds=ahead)) < timedelta(seconds=60)


def test_expiry_is_a_date_or_a_moment(keys: KeysVerb) -> None:
    assert keys.made("--expires", "2130-12-31")["expires"] == "2130-12-31T00:00:00+00:00"
    assert keys.made("--expires", "2130-12-31T01:00:00+02:00")["expires"] == "2130-12-30T23:00:00+00:00"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--expires", "soon"), 2),
        (("--scope", "everything"), 2),
        (("--priority", "urgent"), 2),
        (("--tokens-per-day", "0"), 2),
        (("--expires", "1999-12-31"), 1),
        (("--expires", "999999w"), 1),
        (("--model", ""), 1),
        (("--name", "a\tb"), 1),
    ],
)
def test_create_takes_nothing_that_is_wrong(keys: KeysVerb, args: tuple[str, ...], code: int) -> None:
    result = keys("create", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr
    assert json.loads(keys("list", "--json").stdout) == []


def test_list_shows_valid_keys_and_all_of_them_when_asked(keys: KeysVerb) -> None:
    first, second = keys.made("--name", "one"), keys.made("--name", "two", "--model", "tiny*")
    keys("revoke", first["id"])
    lines = keys("list").stdout.splitlines()
    assert lines[0].split() == ["ID", "NAME", "STATE", "SCOPES", "MODELS", "PRIORITY", "EXPIRES"]
    assert [line.split()[:3] for line in lines[1:]] == [[second["id"], "two", "active"]]
    assert [key["state"] for key in json.loads(keys("list", "--all", "--json").stdout)] == [
        "revoked",
        "active",
    ]
    keys("revoke", second["id"])
    result = keys("list")
    assert "--all` shows 2" in result.stderr


def test_key_that_expires_after_the_last_date_is_shown(keys: KeysVerb) -> None:
    """Such keys could be made, and then none could be listed."""
    made = keys.made("--expires", "9999-12-31T23:59:59")
    assert made["expires"] == "9999-12-31T23:59:59+00:00"
    with sqlite3.connect(keys.folder / FILE) as base:
        base.execute("UPDATE keys SET expires_s = ?", (606_000_000_000.0,))
    base.close()
    assert "9999-12-31 23:59 UTC" in keys("list").stdout
    assert "9999-12-31 23:59 UTC" in keys("show", made["id"]).stdout
    [listed] = json.loads(keys("list", "--json").stdout)
    assert listed["expires"] == made["expires"]


def test_show_tells_all_but_the_secret(keys: KeysVerb) -> None:
    made = keys.made("--name", "one", "--tokens-per-day", "100000")
    result = keys("show", made["id"])
    assert result.exit_code == 0
    told = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert (told["id"], told["name"], told["state"]) == (made["id"], "one", "active")
    assert (told["tokens/day"], told["expires"]) == ("100,000", "never")
    as_json = json.loads(keys("show", made["id"], "--json").stdout)
    assert as_json == {name: value for name, value in made.items() if name != "key"}
    secret = made["key"].rpartition("_")[2]
    assert secret not in result.stdout + str(as_json)


def test_revoke_takes_ids_and_whole_keys(keys: KeysVerb) -> None:
    one, two = keys.made(), keys.made()
    result = keys("revoke", one["id"], two["key"])
    assert result.stdout == f"{one['id']} is revoked\n{two['id']} is revoked\n"
    assert keys("revoke", one["id"]).stdout == f"{one['id']} was revoked before\n"


def test_key_that_is_not_there_is_told_without_its_secret(keys: KeysVerb) -> None:
    keys.made()
    for verb in ("show", "revoke"):
        result = keys(verb, "bear_aaaaaaaaaa_topsecret")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "no key aaaaaaaaaa" in result.stderr and "topsecret" not in result.stderr
        result = keys(verb, "topsecret")
        assert result.exit_code == 1 and "topsecret" not in result.stderr


def test_file_that_holds_no_keys_is_told(keys: KeysVerb) -> None:
    keys.folder.mkdir()
    (keys.folder / FILE).write_bytes(b"no database, but long enough to be taken for one" * 40)
    result = keys("list")
    assert result.exit_code == 1
    assert str(keys.folder / FILE) in result.stderr


def test_names_here_are_those_of_the_server() -> None:
    assert [each.value for each in ScopeName] == [each.value for each in Scope]
    assert {each.name for each in PriorityName} == {each.name for each in Priority}


@pytest.mark.parametrize(
    ("args", "environ", "shown"),
    [
        ((), {}, None),
        ((), {"BEAR_API_KEY": "bear_1"}, "Bearer bear_1"),
        (("--api-key", "bear_2"), {"BEAR_API_KEY": "bear_1"}, "Bearer bear_2"),
    ],
)
def test_verb_shows_the_key(
    server: FakeServer, args: tuple[str, ...], environ: dict[str, str], shown: str | None
) -> None:
    environ = {"BEAR_SERVER": server.target, **environ}
    result = CliRunner().invoke(app, [*args, "ps"], prog_name="bear", env=environ, catch_exceptions=False)
    assert result.exit_code == 0
    assert {*server.credentials} == {shown}


def test_key_that_cannot_be_one_is_wrong_usage(server: FakeServer) -> None:
    result = CliRunner().invoke(app, ["--api-key", "two words", "ps"], prog_name="bear")
    assert result.exit_code == 2
    assert "two words" not in result.stderr
    assert server.credentials == []


@pytest.mark.parametrize(
    ("error", "hint"), [(KeyMissing(), "BEAR_API_KEY"), (ModelDenied("big"), "--model big")]
)
def test_refusal_comes_with_advice(server: FakeServer, error: Any, hint: str) -> None:
    import grpc

    server.refusal = Refusal(
        grpc.StatusCode.PERMISSION_DENIED, error.message, error.reason, metadata=error.metadata
    )
    result = CliRunner().invoke(app, ["ps"], prog_name="bear", env={"BEAR_SERVER": server.target})
    assert result.exit_code == 1
    assert f"[{error.reason}]" in result.stderr
    assert hint in result.stderr
