"""The catalog: what ships, what a user's own file changes, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import jinja2.sandbox
import pytest

from bear_grpc.config import ConfigError
from bear_grpc.models.catalog import read_catalog
from bear_grpc.models.costs import CostStore
from bear_grpc.models.registry import Registry
from bear_grpc.models.shelf import Shelf
from bear_grpc.types import HubSource, LoadOptions, ModelState

OWN = """
[[model]]
name = "mine"
description = "My own"
aliases = ["my"]
source = { repo_id = "owner/repo", file = "folder/model.gguf", revision = "v1" }
sha256 = "%s"
size_bytes = 12
defaults = { temperature = 0, max_tokens = 7 }
load_options = { gpu_layers = -1, context_length = 128 }
chat_template = "{{ messages[0].content }}"
keep_alive_s = 60
pinned = true
license = "mit"
gpu_note = "Helps"
""" % ("ab" * 32)
MINIMAL = '[[model]]\nname = "m"\ndescription = ""\nsource = { repo_id = "a/b", file = "c.gguf" }\n'


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    return file


def test_what_ships_has_sources_and_sane_options():
    entries = {entry.name: entry for entry in read_catalog()}
    assert set(entries) == {"bear-demo", "tinyllama-1.1b", "phi-2", "mistral-7b"}
    demo = entries.pop("bear-demo")
    assert demo.path is not None and demo.path.is_file() and demo.source is None
    for entry in entries.values():
        assert entry.source is not None and entry.source.revision == "main"
        assert (entry.path, entry.violations()) == (None, [])
        assert entry.description and entry.license and entry.gpu_note
        assert (entry.defaults.max_tokens, entry.load_options.context_length) == (1024, 2048)
        # What nobody here can vouch for is the hub's to tell.
        assert (entry.sha256, entry.size_bytes) == ("", 0)


def test_the_template_of_phi_2_is_that_of_its_authors():
    [template] = [entry.chat_template for entry in read_catalog() if entry.chat_template]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [
        {"role": role, "content": content}
        for role, content in [
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", "Hello"),
            ("user", "Why?"),
        ]
    ]
    text = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    assert text == "Be brief.\nInstruct: Hi\nOutput: Hello\nInstruct: Why?\nOutput:"


def test_a_users_models_come_to_those_that_ship(own):
    *_, entry = read_catalog(own)
    assert len(read_catalog(own)) == len(read_catalog()) + 1
    assert entry.source == HubSource("owner/repo", "folder/model.gguf", "v1")
    assert entry.all_load_options == LoadOptions(
        gpu_layers=-1, context_length=128, keep_alive_s=60.0, pinned=True
    )
    assert entry.defaults.temperature == 0


def test_a_users_model_takes_the_place_of_one_that_ships(own):
    own.write_text(OWN.replace('"mine"', '"phi-2"'))
    entries = read_catalog(own)
    assert [entry.description for entry in entries if entry.name == "phi-2"] == ["My own"]
    assert len(entries) == len(read_catalog())


def test_an_empty_catalog_of_a_user_changes_nothing(own):
    own.write_text("# nothing yet\n")
    assert read_catalog(own) == read_catalog()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[model", []),
        ("models = 1", ["models"]),
        ("model = 1", ["[[model]]"]),
        ("model = [1]", ["number 1"]),
        ('[[model]]\ndescription = ""', ["number 1", "name"]),
        (MINIMAL + "unknown = 1", ["model m", "unknown"]),
        (MINIMAL + 'pinned = "yes"', ["model m", "pinned"]),
        (MINIMAL + "load_options = { threads = 0 }", ["model m", "load_options.threads"]),
        (MINIMAL + 'load_options = { threads = "x" }', ["model m", "load_options.threads"]),
        (MINIMAL + "defaults = { top_p = 7 }", ["model m", "defaults.top_p"]),
        (MINIMAL + "keep_alive_s = nan", ["model m", "keep_alive_s"]),
        (MINIMAL + "load_options = { keep_alive_s = inf }", ["model m", "load_options.keep_alive_s"]),
        (MINIMAL + 'sha256 = "AB"', ["model m", "sha256"]),
        (MINIMAL + "size_bytes = -1", ["model m", "size_bytes"]),
        (MINIMAL + 'chat_template = ""', ["model m", "chat_template"]),
        (MINIMAL + 'aliases = ["a b"]', ["model m", "aliases[0]"]),
        (MINIMAL + 'aliases = ["m"]', ["model m", "'m'"]),
        (MINIMAL + 'aliases = ["bear-demo"]', ["model m", "bear-demo"]),
        (MINIMAL + 'embedded = "demo/bear-demo.gguf"', ["model m", "source"]),
        (MINIMAL.replace('"m"', '"a b"'), ["model a b", "name"]),
        (MINIMAL.replace("c.gguf", "../c.gguf"), ["model m", "source.file"]),
        (MINIMAL.replace("a/b", "a"), ["model m", "source.repo_id"]),
        (MINIMAL.replace("source", "#"), ["model m", "source", "required"]),
        (MINIMAL.replace("source", 'embedded = "x" #'), ["model m", "embedded"]),
        (MINIMAL + MINIMAL, ["model m", "twice"]),
        (MINIMAL + MINIMAL.replace('"m"', '"n"\naliases = ["m"]'), ["model n", "'m'"]),
    ],
)
def test_a_wrong_catalog_is_told_with_file_model_and_field(own, text, words):
    own.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_catalog(own)
    assert [word for word in [str(own), *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize("data", [None, b"\xff\xfe"])
def test_a_catalog_that_cannot_be_read_is_told(own, data):
    own.unlink()
    if data is not None:
        own.write_bytes(data)
    with pytest.raises(ConfigError, match="own"):
        read_catalog(own)


async def test_a_shelf_shows_catalog_models_absent_until_their_files_are_here(tmp_path, own):
    """Of what the catalog tells, nothing is lost on the way."""
    shelf = Shelf(
        spawner=None,
        registry=Registry(tmp_path / "registered"),
        costs=CostStore(tmp_path / "costs", "test"),
        allowed_roots=[],
        catalog=own,
    )
    await shelf.open()
    entry = shelf.get("my")
    assert (entry.name, entry.state, entry.path, entry.is_listed) == ("mine", ModelState.ABSENT, None, True)
    assert (entry.expected_sha256, entry.sha256, entry.size_bytes) == ("ab" * 32, "ab" * 32, 12)
    assert (entry.load_options.keep_alive_s, entry.load_options.pinned) == (60.0, True)
    assert (entry.chat_template, entry.has_chat_template) == ("{{ messages[0].content }}", True)
    assert shelf.get("bear-demo").state is ModelState.AVAILABLE
    await shelf.close()
