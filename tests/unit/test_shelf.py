"""The shelf: downloads come, are shown while they do, and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from bear_grpc.config import ConfigError, ModelConfig
from bear_grpc.errors import (
    HubUnreachable,
    InvalidField,
    ModelExists,
    ModelFileInvalid,
    ModelFileNotFound,
    ModelInUse,
    ModelNotFound,
)
from bear_grpc.models.costs import CostStore
from bear_grpc.models.entry import ModelEntry, ModelStatus
from bear_grpc.models.registry import Registry
from bear_grpc.models.shelf import Shelf
from bear_grpc.types import (
    HubSource,
    LoadOptions,
    ModelFile,
    ModelState,
    PullProgress,
    PullStage,
    StateReason,
)
from tests.helpers.ggufs import write_tiny_llama

REFERENCE = "owner/repo:Q4_K_M"
ASKED = HubSource("owner/repo", "", "main")
PINNED = HubSource("owner/repo", "model.gguf", "0" * 40)
PROGRESS = PullProgress(PullStage.DOWNLOADING, 1, 2)
ABSENT, AVAILABLE = ModelState.ABSENT, ModelState.AVAILABLE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "model.gguf")


@pytest.fixture
async def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(
        spawner=None,
        registry=Registry(tmp_path / "registered"),
        costs=CostStore(tmp_path / "costs", "test"),
        allowed_roots=[tmp_path],
        configured={REFERENCE: ModelConfig(load_options=LoadOptions(threads=3))},
    )
    await shelf.open()
    yield shelf
    await shelf.close()


@pytest.fixture
def told(shelf: Shelf) -> list[ModelStatus]:
    """Every status that is published from now on."""
    statuses: list[ModelStatus] = []
    shelf.feed.listen(statuses.append)
    return statuses


async def adopt(shelf: Shelf, name: str, path: Path, source: HubSource = PINNED) -> ModelEntry:
    files = [ModelFile("model.gguf", "cd", 10)]
    return await shelf.adopt(name, path, source=source, files=files, sha256="cd", size_bytes=10)


async def test_a_reference_is_shown_while_it_comes_and_is_a_model_then(shelf, told, model):
    entry = shelf.announce(REFERENCE, ASKED)
    assert shelf.announce(REFERENCE, ASKED) is entry
    shelf.set_pull(REFERENCE, PROGRESS)
    assert await adopt(shelf, REFERENCE, model) is entry
    shelf.set_pull(REFERENCE, None)
    assert [(status.state, status.pull) for status in told] == [
        (ABSENT, None),
        (ABSENT, PROGRESS),
        (AVAILABLE, PROGRESS),
        (AVAILABLE, None),
    ]
    assert (entry.path, entry.source, entry.sha256, entry.size_bytes) == (model, PINNED, "cd", 10)
    assert entry.header is not None and entry.header.architecture == "llama"
    assert (entry.load_options.threads, entry.is_listed) == (3, False)


@pytest.mark.parametrize("spelling", ["owner/repo:q4_k_m", "hf.co/owner/repo:Q4_K_M"])
async def test_a_reference_is_found_however_it_is_written(shelf, spelling):
    entry = shelf.announce(REFERENCE, ASKED)
    assert shelf.get(spelling) is entry
    assert shelf.find("owner/other:Q4_K_M") is None
    with pytest.raises(ModelNotFound) as caught:
        shelf.get("owner/repo:Q4_K_S")
    assert caught.value.metadata["nearest"] == REFERENCE


async def test_a_download_that_failed_is_told_and_a_name_that_stood_for_nothing_else_goes(shelf, told):
    shelf.announce(REFERENCE, ASKED)
    shelf.set_pull(REFERENCE, PROGRESS)
    shelf.set_pull(REFERENCE, None, HubUnreachable("no route"))
    failed, last = told[-2:]
    assert (failed.reason, failed.pull, failed.is_known) == (StateReason.PULL_FAILED, None, True)
    assert "no route" in failed.message
    assert (last.state, last.is_known) == (ABSENT, False)
    assert shelf.find(REFERENCE) is None
    shelf.set_pull(REFERENCE, PROGRESS)  # a late word of a thread
    assert told[-1] is last


async def test_a_catalog_model_whose_download_failed_stays_and_tells_why_until_the_next_one(shelf):
    entry = shelf.announce("phi-2", ASKED)
    shelf.set_pull("phi-2", None, HubUnreachable("no route"))
    assert shelf.get("phi-2") is entry
    assert (entry.state, entry.reason) == (ABSENT, StateReason.PULL_FAILED)
    shelf.set_pull("phi-2", PROGRESS)
    assert (entry.reason, entry.message) == (None, "")


async def test_a_catalog_model_is_absent_again_when_its_file_is_taken_away(shelf, told, model):
    entry = shelf.get("tinyllama-1.1b")
    before = (entry.source, entry.sha256, entry.size_bytes)
    await adopt(shelf, entry.name, model)
    shelf.drop("tinyllama-1.1b")
    assert (entry.state, entry.path, entry.header, entry.files) == (ABSENT, None, None, ())
    assert (entry.source, entry.sha256, entry.size_bytes) == before
    assert [status.state for status in told] == [AVAILABLE, ABSENT]
    assert told[-1].is_known
    shelf.drop("tinyllama-1.1b")  # there is nothing left to take away


async def test_a_reference_is_forgotten_when_its_file_is_taken_away(shelf, told, model):
    await adopt(shelf, REFERENCE, model)
    shelf.drop(REFERENCE)
    assert shelf.find(REFERENCE) is None
    assert (told[-1].state, told[-1].is_known) == (ABSENT, False)


async def test_a_loaded_model_keeps_its_file(shelf, model, tmp_path):
    entry = await adopt(shelf, REFERENCE, model)
    entry.move(ModelState.LOADING)
    assert await adopt(shelf, REFERENCE, model) is entry
    other = write_tiny_llama(tmp_path / "other.gguf")
    with pytest.raises(ModelInUse):
        await adopt(shelf, REFERENCE, other)
    with pytest.raises(ModelInUse):
        shelf.drop(REFERENCE)
    assert entry.path == model


async def test_a_model_that_failed_is_available_with_its_next_file(shelf, model, tmp_path):
    entry = await adopt(shelf, REFERENCE, model)
    entry.move(ModelState.LOADING)
    entry.move(ModelState.FAILED, StateReason.LOAD_FAILED, "no")
    other = write_tiny_llama(tmp_path / "other.gguf")
    await adopt(shelf, REFERENCE, other)
    assert (entry.state, entry.reason, entry.path) == (AVAILABLE, None, other)


async def test_a_file_that_is_no_model_is_not_taken(shelf, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_text("no model")
    with pytest.raises(ModelFileInvalid):
        await adopt(shelf, "phi-2", bad)
    with pytest.raises(ModelFileNotFound):
        await adopt(shelf, "phi-2", tmp_path / "none.gguf")
    assert (shelf.get("phi-2").state, shelf.get("phi-2").path) == (ABSENT, None)


async def test_what_was_not_downloaded_is_left_alone(shelf, model):
    with pytest.raises(ModelExists):
        await adopt(shelf, "bear-demo", model)
    with pytest.raises(InvalidField):
        shelf.drop("bear-demo")
    with pytest.raises(InvalidField):
        await shelf.delete("phi-2")
    with pytest.raises(ModelNotFound):
        shelf.drop("nothing")


MODEL = '[[model]]\nname = "{name}"\ndescription = "{text}"\naliases = {aliases}\n{source}\n'
HUB = 'source = { repo_id = "owner/repo", file = "model.gguf" }'


def catalog(folder: Path, *models: tuple[str, str, list[str]]) -> Path:
    file = folder / "catalog.toml"
    text = [MODEL.format(name=name, text=text, aliases=aliases, source=HUB) for name, text, aliases in models]
    file.write_text("".join(text))
    return file


async def relist(shelf: Shelf, file: Path | None) -> None:
    take_over = await shelf.prepare_catalog(file)
    assert take_over is not None
    take_over()


async def test_a_catalog_read_anew_adds_changes_and_forgets(shelf, told, tmp_path):
    file = catalog(tmp_path, ("a", "first", ["x"]), ("b", "first", []))
    await relist(shelf, file)
    entry = shelf.get("x")
    assert (entry.name, entry.description, entry.is_listed, entry.state) == ("a", "first", True, ABSENT)
    assert await shelf.prepare_catalog(file) is None
    await relist(shelf, catalog(tmp_path, ("a", "second", ["y"]), ("c", "new", ["x"])))
    assert shelf.get("y") is entry
    assert entry.description == "second"
    assert shelf.get("x").name == "c"
    assert shelf.find("b") is None
    assert [(status.name, status.is_known) for status in told if status.name in "abc"] == [
        *(("a", True), ("b", True)),
        *(("b", False), ("a", True), ("c", True)),
    ]


async def test_a_model_that_is_here_stays_when_no_catalog_has_it_any_more(shelf, model, tmp_path):
    await relist(shelf, catalog(tmp_path, ("a", "first", ["x"])))
    entry = await adopt(shelf, "a", model)
    await relist(shelf, None)
    assert shelf.get("a") is entry
    assert (entry.path, entry.is_listed, shelf.find("x")) == (model, False, None)
    # It is the catalog's again, with the file that it has.
    await relist(shelf, catalog(tmp_path, ("a", "again", ["x"])))
    assert shelf.get("x") is entry
    assert (entry.path, entry.sha256, entry.is_listed) == (model, "cd", True)
    await relist(shelf, None)
    shelf.drop("a")
    assert shelf.find("a") is None


async def test_a_model_that_is_being_downloaded_stays_until_that_fails(shelf, tmp_path):
    await relist(shelf, catalog(tmp_path, ("a", "first", [])))
    shelf.set_pull("a", PROGRESS)
    await relist(shelf, None)
    assert shelf.get("a").pull == PROGRESS
    shelf.set_pull("a", None, HubUnreachable("no route"))
    assert shelf.find("a") is None


async def test_settings_of_a_model_hold_over_a_catalog_that_names_it_later(shelf, model, tmp_path):
    await adopt(shelf, REFERENCE, model)
    await relist(shelf, catalog(tmp_path, (REFERENCE, "listed", [])))
    entry = shelf.get(REFERENCE)
    assert (entry.is_listed, entry.load_options.threads) == (True, 3)


@pytest.mark.parametrize(("name", "aliases"), [("mine", []), ("a", ["mine"]), ("a", ["other"])])
async def test_a_catalog_cannot_take_the_name_of_a_registered_model(shelf, model, tmp_path, name, aliases):
    shelf._names.add(ModelEntry("mine", model, False, aliases=("other",)))
    before = [entry.name for entry in shelf.list()]
    with pytest.raises(ConfigError, match=rf"model {name}: .* is a name of mine"):
        await shelf.prepare_catalog(catalog(tmp_path, ("new", "", []), (name, "", aliases)))
    assert [entry.name for entry in shelf.list()] == before
