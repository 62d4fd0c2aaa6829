"""Files of the server that root makes: they belong to whoever owns the folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bear_grpc.access.audit import Entry, append
from bear_grpc.access.keys import KeyStore
from bear_grpc.access.private import make_folder, open_private
from bear_grpc.access.usage import Group, Totals, UsageStore
from bear_grpc.cli import app
from bear_grpc.telemetry.log_file import LogFile

UID, GID = 54_321, 54_322
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What belongs to the server's user."""
    made = tmp_path / "of bear"
    made.mkdir(0o700)
    os.chown(made, UID, GID)
    return made


def keep_keys(state: Path) -> None:
    with KeyStore(state) as store:
        store.create()
        assert len([*state.iterdir()]) == 3  # what SQLite makes beside it while it is open
        check(state)


def keep_usage(state: Path) -> None:
    with UsageStore(state) as store:
        store.add({Group("2026-11-29", "", ""): Totals(1)})
        check(state)


def create_key(state: Path) -> None:
    done = CliRunner().invoke(app, ["keys", "create", "--state-dir", str(state)], catch_exceptions=False)
    assert done.exit_code == 0


def check(folder: Path) -> None:
    owners = {path: (path.stat().st_uid, path.stat().st_gid) for path in folder.rglob("*")}
    assert owners and set(owners.values()) == {(UID, GID)}, owners


@only_root
@pytest.mark.parametrize(
    "make",
    [
        keep_keys,
        keep_usage,
        create_key,
        lambda state: append(state, Entry("A")),
        lambda state: LogFile(state / "logs" / "bear.log", 1000, 2).write("x"),
    ],
    ids=["keys", "usage", "bear keys", "audit", "log"],
)
@pytest.mark.parametrize("inner", [".", "state", "share/bear/state"])
def test_what_root_makes_is_the_folders_owners(
    folder: Path, make: Callable[[Path], None], inner: str
) -> None:
    make(folder / inner)
    check(folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}


@only_root
def test_what_was_there_keeps_its_owner(folder: Path) -> None:
    (folder / "audit.log").touch()
    append(folder, Entry("A"))
    assert (folder / "audit.log").stat().st_uid == 0


def test_new_folders_are_private_and_those_above_them_as_others(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        make_folder(tmp_path / "a" / "b")
        make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b")] == [0o755, 0o700]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(OSError, match="file"):
            make_folder(path)


def test_a_link_is_not_followed_when_a_file_is_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        open_private(tmp_path / "link", os.O_RDWR | os.O_NOFOLLOW)
    assert not (tmp_path / "elsewhere").exists()
