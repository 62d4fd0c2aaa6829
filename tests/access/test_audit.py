"""The audit log: its lines follow from each other, whoever writes them, and a change is seen."""

from __future__ import annotations

import json
import stat
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bear_grpc.access.audit import FILE, Entry, append, check, entry_of, lines
from bear_grpc.cli import app


def write(folder: Path, count: int, actor: str = "me") -> None:
    for number in range(count):
        append(folder, Entry("LoadModel", actor=actor, subjects=(f"model-{number}",)))


def test_lines_follow_from_each_other_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    write(tmp_path, 4)
    checked = check(lines(tmp_path))
    assert (checked.line_count, checked.problems) == (4, ())
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    assert check([]).problems == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda found: [found[0].replace(b"me", b"you"), *found[1:]],
        lambda found: found[1:],
        lambda found: [*found[:1], *found[2:]],
        lambda found: [found[1], found[0], *found[2:]],
        lambda found: [*found, found[-1]],
        lambda found: [*found[:2], found[2][:20], *found[3:]],
    ],
    ids=["edited", "cut at the begin", "cut within", "reordered", "repeated", "torn"],
)
def test_a_change_is_seen(tmp_path: Path, change: object) -> None:
    write(tmp_path, 4)
    assert callable(change)
    assert check(change(lines(tmp_path))).problems


def test_lines_cut_off_the_end_show_in_the_hash_of_the_last(tmp_path: Path) -> None:
    write(tmp_path, 3)
    found = lines(tmp_path)
    assert check(found).last_hash != check(found[:-1]).last_hash


def test_a_line_that_a_crash_tore_stays_and_the_next_stands_alone(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"action":"Lo')
    write(tmp_path, 1)
    assert len(lines(tmp_path)) == 3
    assert check(lines(tmp_path)).problems == ("line 2 is damaged",)


def test_a_last_line_longer_than_a_block_is_hashed_whole(tmp_path: Path) -> None:
    append(tmp_path, Entry("A"))
    append(tmp_path, Entry("RegisterModel", subjects=("x" * 200_000,)))
    append(tmp_path, Entry("B"))
    assert check(lines(tmp_path)).problems == ()


def write_together(folder: Path, barrier: Barrier, actor: str) -> None:
    barrier.wait(60)
    write(folder, 100, actor)


def test_processes_may_write_at_the_same_time(tmp_path: Path) -> None:
    context = get_context("spawn")
    barrier = context.Barrier(3)
    writers = [context.Process(target=write_together, args=(tmp_path, barrier, actor)) for actor in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = lines(tmp_path)
    assert (len(found), check(found).problems) == (300, ())


def bear(folder: Path, *args: str) -> tuple[int, str, str]:
    environ = {"BEAR_STATE_DIR": str(folder)}
    result = CliRunner().invoke(app, args, prog_name="bear", env=environ, catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_changes_of_keys_are_recorded_and_shown(tmp_path: Path) -> None:
    key_id = json.loads(bear(tmp_path, "keys", "create", "--json")[1])["id"]
    bear(tmp_path, "keys", "revoke", key_id)
    bear(tmp_path, "keys", "revoke", key_id)  # changes nothing
    told = json.loads(bear(tmp_path, "audit", "--json", "--since", "1h")[1])
    assert [(each["action"], each["subjects"]) for each in told] == [
        ("CreateKey", [key_id]),
        ("RevokeKey", [key_id]),
    ]
    assert told[0]["actor"].startswith("os:")
    assert "CreateKey" in bear(tmp_path, "audit")[1]
    assert json.loads(bear(tmp_path, "audit", "--json", "--since", "2999-01-01")[1]) == []


def test_verify_ends_with_an_error_for_an_edited_log(tmp_path: Path) -> None:
    write(tmp_path, 2)
    code, told, _ = bear(tmp_path, "audit", "--verify")
    assert code == 0
    assert check(lines(tmp_path)).last_hash in told
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes().replace(b"model-0", b"model-9"))
    code, _, problems = bear(tmp_path, "audit", "--verify")
    assert code == 1
    assert "line 2 does not follow" in problems


def test_a_damaged_line_is_no_entry() -> None:
    assert entry_of(b"{") is None
