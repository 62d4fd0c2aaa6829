"""Keys: their text, what is kept of them, who comes with them, and how failures are slowed."""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from bear_grpc.access.authentication import Authenticator, credential_of
from bear_grpc.access.caller import Quotas, Scope
from bear_grpc.access.key import MAX_TIME_S, Key, digest_of, id_of, new_id_and_secret, parse, text_of
from bear_grpc.access.keys import FILE, KeyStore, KeyStoreError
from bear_grpc.access.slowing import (
    FIRST_DELAY_S,
    FREE_FAILURES,
    LONGEST_DELAY_S,
    MAX_HOSTS,
    WINDOW_S,
    Failures,
)
from bear_grpc.params import Priority
from bear_grpc.testing.clock import FakeClock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1_000_000.0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_key_text_has_an_id_and_256_random_bits():
    keys = [new_id_and_secret() for _ in range(500)]
    texts = {text_of(*pair) for pair in keys}
    assert len(texts) == len({key_id for key_id, _ in keys}) == 500
    for key_id, secret in keys:
        assert parse(text_of(key_id, secret)) == (key_id, secret)
        assert text_of(key_id, secret).count("_") == 2  # a double click takes all of it
    # 43 characters of 62, all of which come: less would lose bits.
    assert {len(secret) for _, secret in keys} == {43}
    assert len(set("".join(secret for _, secret in keys))) == 62
    assert 43 * math.log2(62) > 256


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bear_",
        "bear_abcdefghij",
        "bear_abcdefghij_",
        f"bear_abcdefghij_{'0' * 42}",
        f"bear_abcdefghij_{'0' * 44}",
        f"bear_abcdefghi1_{'0' * 43}",
        f"bear_abcdefghij_{'-' * 43}",
        f"bear_abcdefghij_{'0' * 43}\n",
        f"BEAR_abcdefghij_{'0' * 43}",
    ],
)
def test_key_text_of_another_form_is_none(text: str):
    assert parse(text) is None


@pytest.mark.parametrize("text", ["abcdefghij", "bear_abcdefghij", f"bear_abcdefghij_{'0' * 43}"])
def test_key_id_is_found_in_a_whole_key_too(text: str):
    assert id_of(text) == "abcdefghij"
    assert id_of("all keys") is None


def test_store_keeps_what_was_chosen_and_no_secret(folder: Path, clock: FakeClock):
    chosen = {
        "name": "ci",
        "scopes": frozenset({Scope.INFER}),
        "models": ("tiny*", "owner/repo:*"),
        "priority": Priority.LOW,
        "quotas": Quotas(1, 2, 3, 4),
        "expires_s": clock.now + 60,
    }
    with KeyStore(folder, clock) as store:
        key, text = store.create(**chosen)
        parsed = parse(text)
        assert parsed is not None and parsed[0] == key.id
        assert key == Key(
            id=key.id,
            secret_sha256=hashlib.sha256(parsed[1].encode()).digest(),
            created_s=clock.now,
            **chosen,  # type: ignore[arg-type]
        )
    with KeyStore(folder) as again:
        assert again.all() == [key]
        assert again.get(key.id) == key
        assert again.get("aaaaaaaaaa") is None
    for file in folder.iterdir():
        assert parsed[1].encode() not in file.read_bytes()


def test_store_is_for_its_owner_only(tmp_path: Path):
    old = os.umask(0o022)
    try:
        folder = tmp_path / "new"
        with KeyStore(folder) as store:
            store.create()
            assert mode(folder) == 0o700
            assert {mode(file) for file in folder.iterdir()} == {0o600}
            assert len([*folder.iterdir()]) == 3  # what SQLite writes beside it is no more open
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(0o775)
        (shared / FILE).touch()
        (shared / FILE).chmod(0o644)
        KeyStore(shared).close()
        assert (mode(shared), mode(shared / FILE)) == (0o755, 0o600)
    finally:
        os.umask(old)


def test_store_follows_no_link(tmp_path: Path, folder: Path):
    folder.mkdir()
    (folder / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyStoreError, match=FILE):
        KeyStore(folder)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "chosen",
    [
        {"name": "a\nb"},
        {"name": "x" * 101},
        {"scopes": frozenset()},
        {"models": ()},
        {"models": ("",)},
        {"models": ("x" * 257,)},
        {"models": ("x",) * 101},
        {"expires_s": 1_000_000.0},
        {"expires_s": MAX_TIME_S + 1},
        {"expires_s": math.inf},
        {"expires_s": math.nan},
        {"quotas": Quotas(tokens_per_day=0)},
    ],
)
def test_store_takes_no_key_that_is_wrong(folder: Path, clock: FakeClock, chosen: dict[str, object]):
    with KeyStore(folder, clock) as store:
        with pytest.raises(KeyStoreError):
            store.create(**chosen)
        assert store.all() == []


def test_store_revokes_once_and_keeps_the_first_time(folder: Path, clock: FakeClock):
    with KeyStore(folder, clock) as store:
        key, _ = store.create()
        clock.now += 10
        assert store.revoke(key.id)
        clock.now += 10
        assert not store.revoke(key.id)
        assert not store.revoke("aaaaaaaaaa")
        found = store.get(key.id)
        assert found is not None and found.revoked_s == 1_000_010.0
        assert found.state(clock.now) == "revoked"


def test_store_tells_changes_of_others_once(folder: Path):
    with KeyStore(folder) as reader, KeyStore(folder) as writer:
        assert reader.changed() == []
        assert reader.changed() is None
        key, _ = writer.create()
        assert reader.changed() == [key]
        assert reader.changed() is None
        writer.revoke(key.id)
        changed = reader.changed()
        assert changed is not None and changed[0].revoked_s is not None


def test_store_that_is_replaced_is_read_anew(tmp_path: Path, folder: Path):
    """A file restored from a copy must count."""
    with KeyStore(tmp_path / "copy") as other:
        restored, _ = other.create(name="restored")
    with KeyStore(folder) as reader:
        reader.changed()
        for file in folder.glob(f"{FILE}-*"):
            file.unlink()
        (tmp_path / "copy" / FILE).replace(folder / FILE)
        assert reader.changed() == [restored]


def test_store_that_is_gone_for_a_moment_is_no_store_without_keys(tmp_path: Path, folder: Path):
    """Whoever puts a copy back in two steps must not revoke every key in between."""
    file = folder / FILE
    with KeyStore(folder) as reader:
        key, _ = reader.create()
        assert reader.changed() == [key]
        file.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(KeyStoreError, match=FILE):
                reader.changed()
        assert not file.exists()
        file.touch()  # as a copy begins
        with pytest.raises(KeyStoreError, match="no table"):
            reader.changed()
        assert file.stat().st_size == 0
        (tmp_path / "away").replace(file)
        assert reader.changed() is None
        other, _ = reader.create()
        assert reader.get(other.id) == other
    with KeyStore(folder) as again:
        assert again.all() == [key, other]


def test_store_that_is_no_database_or_of_a_later_version_is_told(tmp_path: Path, folder: Path):
    folder.mkdir()
    (folder / FILE).write_bytes(b"no database, but long enough to be taken for one" * 40)
    with pytest.raises(KeyStoreError, match=FILE):
        KeyStore(folder)
    later = tmp_path / "later"
    KeyStore(later).close()
    with sqlite3.connect(later / FILE) as base:
        base.execute("PRAGMA user_version = 99")
    base.close()
    with pytest.raises(KeyStoreError, match="later version"):
        KeyStore(later)


def test_store_tells_a_key_that_is_damaged(folder: Path):
    with KeyStore(folder) as store:
        store.create()
        with sqlite3.connect(folder / FILE) as base:
            base.execute("UPDATE keys SET scopes = '[\"everything\"]'")
        base.close()
        with pytest.raises(KeyStoreError, match="damaged"):
            store.all()


@pytest.mark.parametrize(
    ("metadata", "credential"),
    [
        ({}, None),
        ({"authorization": "Bearer bear_1"}, "bear_1"),
        ({"authorization": "bearer  bear_1 "}, "bear_1"),
        ({"authorization": "Basic abc"}, None),
        ({"authorization": "Basic abc", "x-api-key": "bear_2"}, "bear_2"),
        ({"authorization": "Bearer bear_1", "x-api-key": "bear_2"}, "bear_1"),
        ({"x-api-key": " bear_2"}, "bear_2"),
        ({"x-api-key": ""}, None),
        ({"authorization": "Bearer "}, ""),
    ],
)
def test_credential_is_a_bearer_token_or_an_api_key(metadata: dict[str, str | bytes], credential: str | None):
    assert credential_of(metadata) == credential


def test_caller_is_the_one_of_a_valid_key_only(clock: FakeClock):
    key_id, secret = new_id_and_secret()
    _, other_secret = new_id_and_secret()
    key = Key(id=key_id, secret_sha256=digest_of(secret), expires_s=clock.now + 10)
    known = Authenticator([key], clock)
    caller = known.caller_of(text_of(key_id, secret))
    assert caller == key.caller()
    assert caller is not None and (caller.id, caller.tenant) == (key_id, key_id)
    assert known.caller_of(text_of(key_id, other_secret)) is None
    assert known.caller_of(text_of("aaaaaaaaaa", secret)) is None
    assert known.caller_of(secret) is None
    assert known.caller_of("") is None
    assert known.is_valid(key_id)
    clock.now += 10
    assert known.caller_of(text_of(key_id, secret)) is None
    assert not known.is_valid(key_id)


def test_caller_of_a_revoked_or_forgotten_key_is_nobody(clock: FakeClock):
    key_id, secret = new_id_and_secret()
    key = Key(id=key_id, secret_sha256=digest_of(secret))
    known = Authenticator([key], clock)
    known.replace([Key(id=key_id, secret_sha256=digest_of(secret), revoked_s=clock.now)])
    assert known.caller_of(text_of(key_id, secret)) is None
    known.replace([])
    assert known.caller_of(text_of(key_id, secret)) is None
    assert not known.is_valid(key_id)


def test_failures_are_slowed_more_and_more_by_host(clock: FakeClock):
    failures = Failures(clock)
    assert [failures.count("a") for _ in range(FREE_FAILURES)] == [0.0] * FREE_FAILURES
    delays = [failures.count("a") for _ in range(20)]
    assert delays[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays[-1] == LONGEST_DELAY_S
    assert failures.count("b") == 0.0
    clock.now += WINDOW_S + 1
    assert failures.count("a") == 0.0


def test_failures_of_many_hosts_take_no_more_room(clock: FakeClock):
    failures = Failures(clock)
    for _ in range(FREE_FAILURES + 1):
        failures.count("again")
    for number in range(MAX_HOSTS - 1):
        failures.count(f"host {number}")
    assert failures.count("again") == 2 * FIRST_DELAY_S  # it failed last, and stays
    for number in range(2 * MAX_HOSTS):
        failures.count(f"other {number}")
    assert len(failures) == MAX_HOSTS
