"""The keys of a running server, when the disk does not do what it should."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

import pytest

from bear_grpc.access import live_keys as module
from bear_grpc.access.authentication import Authenticator
from bear_grpc.access.key import Key
from bear_grpc.access.keys import FILE, KeyStore
from bear_grpc.access.live_keys import LiveKeys

WAIT_S = 30.0


class Hanging:
    """A disk that answers no more from `hang` on, until it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.is_asked, self.answers = threading.Event(), threading.Event()

    def hang(self) -> None:
        def changed(store: KeyStore) -> list[Key] | None:
            self.is_asked.set()
            self.answers.wait()
            return None

        self._patch.setattr(KeyStore, "changed", changed)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PERIOD_S", 0.01), ("SLOW_S", 0.02), ("CLOSE_S", 0.05)):
        monkeypatch.setattr(module, name, seconds)


def test_a_disk_that_hangs_holds_up_neither_expiry_nor_the_stop_nor_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, ticks = Hanging(monkeypatch), 0

    async def serve() -> None:
        ticked = asyncio.Event()

        def tick() -> None:
            nonlocal ticks
            ticks += disk.is_asked.is_set()
            if ticks == 10:
                ticked.set()

        keys = LiveKeys(tmp_path, Authenticator(), tick)
        await keys.open()
        disk.hang()
        async with asyncio.timeout(WAIT_S):
            await ticked.wait()
        await keys.close()

    # The thread ends when asyncio.run has waited for all that it waits for.
    server = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    server.start()
    server.join(WAIT_S)
    has_ended = not server.is_alive()
    disk.answers.set()
    assert has_ended and ticks >= 10
    told = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert [message.rpartition(": ")[2] for message in told] == ["the disk does not answer"] * 2


async def test_keys_stay_in_force_while_their_file_is_gone_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, known = tmp_path / "state", Authenticator()
    with KeyStore(state) as store:
        key, text = store.create()
        keys = LiveKeys(state, known, lambda: None)
        await keys.open()
        caplog.set_level(logging.INFO, module.__name__)
        try:
            (state / FILE).rename(tmp_path / "away")
            for _ in range(3):
                await keys.refresh()
            assert known.caller_of(text) is not None and known.is_valid(key.id)
            (tmp_path / "away").rename(state / FILE)
            await keys.refresh()
            assert store.revoke(key.id)
            await keys.refresh()
            assert known.caller_of(text) is None
        finally:
            await keys.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO", "INFO"]
    assert FILE in caplog.records[0].message


async def test_nothing_is_closed_that_could_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    keys = LiveKeys(tmp_path, Authenticator(), lambda: None)
    with pytest.raises(module.KeyStoreError):
        await keys.open()
    await keys.close()
