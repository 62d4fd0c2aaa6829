"""What changes a server is in its audit log, what only uses it is not."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bear_grpc.access.audit import FILE, Entry, check, entry_of, lines
from bear_grpc.access.caller import Caller, Scope
from bear_grpc.access.keys import KeyStore
from bear_grpc.access.refusals import TOLD, WINDOW_S
from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc import audit
from bear_grpc.rpc.call import Call
from bear_grpc.server import Server
from bear_grpc.testing.clock import FakeClock
from tests.helpers.rpc import WAIT_S, Api, Code, fails, serving, stopped_load


def entries(state: Path) -> list[Entry]:
    found = lines(state)
    assert check(found).problems == ()
    return [entry for line in found if (entry := entry_of(line)) is not None]


async def key(server: Server, store: KeyStore, *scopes: Scope) -> tuple[str, str]:
    made, text = store.create(scopes=frozenset(scopes))
    assert server.keys is not None
    await server.keys.refresh()
    return made.id, text


async def test_changes_and_refused_ones_are_recorded_and_reads_are_not(
    tmp_path: Path, spawner: Spawner, tiny_file: Path
) -> None:
    state = tmp_path / "state"
    async with serving(tmp_path, spawner, auth="keys", allow_path=[tiny_file.parent]) as (server, nobody):
        with KeyStore(state) as store:
            admin_id, admin = await key(server, store, *Scope)
            user_id, user = await key(server, store, Scope.INFER, Scope.MODELS_READ)
        async with Api(server.addresses[0], key=admin) as api:
            await api.register("tiny", tiny_file)
            await api.load("tiny")
            async with Api(server.addresses[0], key=user) as other:
                await fails(other.load("tiny"), Code.PERMISSION_DENIED, "SCOPE_MISSING")
            await fails(nobody.load("tiny"), Code.UNAUTHENTICATED, "KEY_MISSING")
            await fails(api.load("missing"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert [(each.action, each.actor, each.subjects, each.code, each.reason) for each in entries(state)] == [
        ("RegisterModel", admin_id, ("tiny",), "OK", ""),
        ("LoadModel", admin_id, ("tiny",), "OK", ""),
        ("LoadModel", user_id, ("tiny",), "PERMISSION_DENIED", "SCOPE_MISSING"),
        ("LoadModel", admin_id, ("missing",), "NOT_FOUND", "MODEL_NOT_FOUND"),
    ]


async def test_a_call_that_ends_with_its_key_is_recorded(
    tmp_path: Path, spawner: Spawner, tiny_file: Path
) -> None:
    """It has the code of calls that were never let in, which are left out."""
    state = tmp_path / "state"
    async with serving(tmp_path, spawner, auth="keys", allow_path=[tiny_file.parent]) as (server, _):
        with KeyStore(state) as store:
            key_id, text = await key(server, store, *Scope)
            async with Api(server.addresses[0], key=text) as api:
                await api.register("tiny", tiny_file)
                call, pid = await stopped_load(api, "tiny")
                try:
                    assert server.keys is not None and store.revoke(key_id)
                    await server.keys.refresh()
                    await fails(call, Code.UNAUTHENTICATED, "KEY_INVALID")
                finally:
                    os.kill(pid, signal.SIGCONT)
    last = entries(state)[-1]
    assert (last.action, last.actor, last.subjects) == ("LoadModel", key_id, ("tiny",))
    assert (last.code, last.reason) == ("UNAUTHENTICATED", "KEY_INVALID")


async def test_a_log_that_cannot_be_written_costs_no_answer(
    tmp_path: Path, spawner: Spawner, tiny_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state" / FILE).mkdir(parents=True)
    with caplog.at_level(logging.ERROR):
        async with serving(tmp_path, spawner, allow_path=[tiny_file.parent]) as (_, api):
            await api.register("tiny", tiny_file)
    assert "not in the audit log" in caplog.text


def ended(actor: str, *, refused: bool = False) -> Call:
    call = Call("/bear_grpc.v1.ModelService/LoadModel", caller=Caller(id=actor), is_known=True)
    call.code, call.is_admitted = ("PERMISSION_DENIED", False) if refused else ("OK", True)
    call.subjects = ("x" * 1000,) * 100
    return call


def test_refused_calls_of_a_key_are_told_by_their_number_above_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "PERIOD_S", 0.01)
    clock = FakeClock()
    observer = audit.AuditObserver(tmp_path, clock)
    for _ in range(TOLD + 40):
        observer.end(ended("user", refused=True))
        observer.end(ended("admin"))
    clock.advance(WINDOW_S)
    ends_s = time.monotonic() + WAIT_S
    while not any(each.count > 1 for each in entries(tmp_path)):  # its own thread tells it
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    observer.end(ended("user", refused=True))
    observer.close()
    found = entries(tmp_path)
    assert sum(each.actor == "admin" for each in found) == TOLD + 40
    by_user = [each for each in found if each.actor == "user"]
    assert sorted(each.count for each in by_user) == [*[1] * (TOLD + 1), 40]
    assert max(len(line) for line in lines(tmp_path) if b"PERMISSION" in line) < 1500


def test_refused_calls_take_no_room_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()

    def append(folder: Path, entry: Entry) -> None:
        answers.wait()
        write(folder, entry)

    write = audit.append
    monkeypatch.setattr(audit, "append", append)
    monkeypatch.setattr(audit, "MAX_WAITING", 10)
    monkeypatch.setattr(audit, "MAX_REFUSED_WAITING", 4)
    observer = audit.AuditObserver(tmp_path)
    for number in range(30):
        observer.end(ended(f"user {number}", refused=True))
    for _ in range(6):
        observer.end(ended("admin"))
    answers.set()
    observer.close()
    found = entries(tmp_path)
    assert sum(each.actor == "admin" for each in found) == 6
    assert sum(each.count for each in found) == 36
    assert not caplog.records


def test_a_disk_that_does_not_answer_holds_up_no_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(audit, "append", lambda *_: answers.wait())
    monkeypatch.setattr(audit, "CLOSE_S", 0.05)
    observer = audit.AuditObserver(tmp_path)
    for _ in range(3):
        observer.end(Call("/bear_grpc.v1.ModelService/LoadModel", code="OK", is_known=True, is_admitted=True))
    observer.close()
    assert "does not answer" in caplog.text
    answers.set()
