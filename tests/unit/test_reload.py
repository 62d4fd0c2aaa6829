"""Settings of a running server: taken over where they can be, all of them or none."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec
import pytest

from bear_grpc.config import ConfigError, ModelConfig, ServerConfig
from bear_grpc.input_limits import InputLimits
from bear_grpc.reload import Commit, Reloads

OLD = ServerConfig()


def changed(**values: object) -> ServerConfig:
    return msgspec.structs.replace(OLD, **values)


class Watched(Reloads):
    """Keeps what its parts are given."""

    def __init__(self, *names: str) -> None:
        super().__init__(OLD)
        self.given: list[tuple[str, ServerConfig]] = []
        for name in names:
            self.add(name, apply=lambda config, name=name: self.given.append((name, config)))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


async def test_a_changed_setting_is_given_to_its_part_and_told(told: pytest.LogCaptureFixture) -> None:
    reloads = Watched("auto_pull", "offline")
    new = changed(offline=True)
    await reloads.reload(lambda: new)
    assert reloads.given == [("offline", new)]
    assert reloads.config == new
    assert told.messages == ["reloaded: offline"]


async def test_nothing_has_changed_when_the_settings_are_the_same(told: pytest.LogCaptureFixture) -> None:
    reloads = Watched("offline")
    await reloads.reload(lambda: changed())
    assert (reloads.given, told.messages) == ([], ["reloaded: nothing has changed"])


async def test_what_needs_a_restart_is_told_each_time_and_stays(told: pytest.LogCaptureFixture) -> None:
    reloads = Watched("offline", "limits")
    limits = InputLimits(max_message_bytes=1024, max_answers=3)
    new = changed(offline=True, listen=["unix:/other"], models={"m": ModelConfig()}, limits=limits)
    await reloads.reload(lambda: new)
    in_force = changed(offline=True, limits=InputLimits(max_answers=3))
    assert reloads.config == in_force
    assert reloads.given == [("offline", in_force), ("limits", in_force)]
    left = "needs a restart: listen, limits.max_message_bytes, models"
    assert told.messages == [f"reloaded: offline, limits.max_answers; {left}"]
    await reloads.reload(lambda: new)
    assert told.messages[1:] == [f"reloaded: nothing has changed; {left}"]


async def test_a_setting_that_no_part_takes_needs_a_restart(told: pytest.LogCaptureFixture) -> None:
    reloads = Watched("auto_pull")
    await reloads.reload(lambda: changed(offline=True))
    assert reloads.config == OLD
    assert told.messages == ["reloaded: nothing has changed; needs a restart: offline"]


async def test_wrong_settings_leave_everything_as_it_was(told: pytest.LogCaptureFixture) -> None:
    reloads = Watched("offline")

    def read() -> ServerConfig:
        raise ConfigError("bear.toml:3: offline: expected `bool`, got `str`")

    await reloads.reload(read)
    assert (reloads.config, reloads.given) == (OLD, [])
    assert [record.levelname for record in told.records] == ["ERROR"]
    assert told.messages == ["nothing is reloaded: bear.toml:3: offline: expected `bool`, got `str`"]


@pytest.mark.parametrize("error", [ConfigError("catalog: is wrong"), RuntimeError("a mistake")])
async def test_a_part_that_refuses_keeps_all_others_from_changing(
    error: Exception, told: pytest.LogCaptureFixture
) -> None:
    reloads = Watched("offline")

    async def prepare(config: ServerConfig) -> Commit | None:
        raise error

    reloads.add_files("catalog", prepare=prepare)
    await reloads.reload(lambda: changed(offline=True))
    assert (reloads.config, reloads.given) == (OLD, [])
    assert [record.levelname for record in told.records] == ["ERROR"]


async def test_a_part_with_files_is_asked_each_time(told: pytest.LogCaptureFixture) -> None:
    reloads, committed = Reloads(OLD), []
    answers: list[Commit | None] = [None, lambda: committed.append("new content")]

    async def prepare(config: ServerConfig) -> Commit | None:
        return answers.pop(0)

    reloads.add_files("catalog", prepare=prepare)
    await reloads.reload(lambda: OLD)
    await reloads.reload(lambda: OLD)
    assert committed == ["new content"]
    assert told.messages == ["reloaded: nothing has changed", "reloaded: catalog"]


async def test_a_path_that_changes_without_its_content_is_taken_over(told: pytest.LogCaptureFixture) -> None:
    reloads = Reloads(OLD)

    async def prepare(config: ServerConfig) -> Commit | None:
        assert config.catalog == Path("/c")
        return None

    reloads.add_files("catalog", prepare=prepare)
    await reloads.reload(lambda: changed(catalog=Path("/c")))
    assert told.messages == ["reloaded: catalog"]


async def test_a_part_that_fails_at_the_last_does_not_keep_others_back(
    told: pytest.LogCaptureFixture,
) -> None:
    reloads = Reloads(OLD)
    given = []

    def fail(config: ServerConfig) -> None:
        raise RuntimeError("a mistake")

    reloads.add("offline", apply=fail)
    reloads.add("offline", apply=given.append)
    await reloads.reload(lambda: changed(offline=True))
    assert given == [changed(offline=True)]
    assert [record.levelname for record in told.records] == ["ERROR", "INFO"]


async def test_one_reload_comes_after_the_other() -> None:
    reloads, running, most = Reloads(OLD), 0, 0

    async def prepare(config: ServerConfig) -> Commit | None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return None

    reloads.add_files("catalog", prepare=prepare)
    await asyncio.gather(*(reloads.reload(lambda: OLD) for _ in range(3)))
    assert most == 1
