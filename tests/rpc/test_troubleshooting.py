"""docs/troubleshooting.md, entry by entry: each reason is brought about, and what the page says helps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from bear_grpc import errors
from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.status import CODES
from tests.helpers.errors import LEAVES
from tests.helpers.rpc import Api, StatusDetails
from tests.helpers.troubleshooting import ENTRIES, REASONS, shows
from tests.rpc.troubles import hub, models, requests, server
from tests.rpc.troubles.bench import Bench

RAISED = {kind.reason: kind for kind in (*LEAVES, errors.BackendError)}
CASES: dict[str, Callable[[Bench], Awaitable[list[StatusDetails]]]] = {
    reason: getattr(module, reason.lower())
    for reason in RAISED
    for module in (requests, models, hub, server)
    if hasattr(module, reason.lower())
}

pytestmark = pytest.mark.model


def test_there_is_one_entry_and_one_case_for_each_reason() -> None:
    titles = [entry.title for entry in ENTRIES]
    assert sorted(title for title in titles if title in REASONS) == sorted(RAISED) == sorted(CASES)
    assert len(titles) == len({*titles})


@pytest.mark.parametrize("reason", RAISED)
def test_entry_has_the_code_that_is_sent(reason: str) -> None:
    assert REASONS[reason].code == CODES[RAISED[reason]].name


def test_sections_are_the_groups_of_errors() -> None:
    groups: dict[str, set[type[errors.BearError]]] = {}
    for reason, entry in REASONS.items():
        kind = RAISED[reason]
        base = kind if kind.__base__ is errors.BearError else kind.__base__
        groups.setdefault(entry.section, set()).add(base)
    assert all(len(bases) == 1 for bases in groups.values()), groups
    assert len(groups) == len({*map(frozenset, groups.values())})


@pytest.fixture
async def bench(
    api: Api,
    files: Path,
    tmp_path: Path,
    spawner: Spawner,
    start: Callable[..., Spawner],
    steady_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> AsyncIterator[Bench]:
    found = Bench(api, files, tmp_path, spawner, start, steady_file, monkeypatch, caplog)
    yield found
    await found.close()


@pytest.mark.slow
@pytest.mark.parametrize("reason", CASES)
async def test_entry_is_what_happens_and_its_remedy_helps(bench: Bench, reason: str) -> None:
    entry = REASONS[reason]
    found = await CASES[reason](bench)
    messages = [told.message for told in found]
    assert [text for text in messages if not any(shows(each, text) for each in entry.examples)] == []
    assert [each for each in entry.examples if not any(shows(each, text) for text in messages)] == []
    # What the page says of retrying is what a program is told.
    assert any(told.retry is not None for told in found) == ("`RetryInfo`" in entry.retry)
