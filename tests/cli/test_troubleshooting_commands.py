"""docs/troubleshooting.md names no command, option, setting, field or heading that there is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf.descriptor import Descriptor

from bear_grpc.config import ServerConfig
from bear_grpc.v1 import inference_service_pb2, model_service_pb2, server_service_pb2, types_pb2
from tests.cli.conftest import Bear
from tests.cli.test_docs import GROUPS, VERBS
from tests.helpers.troubleshooting import ENTRIES, PAGE

TEXT = " ".join(PAGE.read_text(encoding="utf-8").split())
SPANS = sorted({*re.findall(r"`([^`]+)`", re.sub(r"``` .*? ```", "", TEXT))})
COMMANDS = [span for span in SPANS if re.match(r"bear (--|[a-z])", span)]
OF_THE_LOG = {"code", "id", "reason"}
# Of metadata and of files outside of this project.
OTHERS = {"predicted_seconds", "offset_bytes", "llama_decode", "s_client"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_and_has_its_options(bear: Bear, command: str) -> None:
    found = re.fullmatch(r"bear(?: --server \S+)? ([a-z]+)(?: ([a-z]+)\b)?(.*)", command)
    assert found is not None, command
    verb, under, rest = found.groups()
    assert verb in [*VERBS, *GROUPS]
    usage = bear(verb, *([under] if verb in GROUPS and under else []), "--help").stdout
    assert [option for option in re.findall(r"--[a-z-]+", rest) if option not in usage] == []


def test_options_alone_are_those_of_some_verb(bear: Bear) -> None:
    usage = bear("--help").stdout + "".join(bear(verb, "--help").stdout for verb in VERBS)
    usage += "".join(bear("keys", verb, "--help").stdout for verb in ("create", "list", "show"))
    told = {option for span in SPANS if span.startswith("--") for option in re.findall(r"--[a-z-]+", span)}
    assert told
    assert [option for option in told if option not in usage] == []


def _settings(kind: Any) -> set[str]:
    """Names of settings, those in tables too."""
    names: set[str] = set()
    for field in msgspec.structs.fields(kind):
        names.add(field.name)
        for part in [field.type, *getattr(field.type, "__args__", ())]:
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                names |= _settings(part)
    return names


def _fields(message: Descriptor) -> set[str]:
    return {field.name for field in message.fields}.union(*map(_fields, message.nested_types))


def test_names_are_those_of_settings_or_of_the_contract() -> None:
    known = _settings(ServerConfig) | OF_THE_LOG | OTHERS
    for module in (inference_service_pb2, model_service_pb2, server_service_pb2, types_pb2):
        known = known.union(*map(_fields, module.DESCRIPTOR.message_types_by_name.values()))
    words = {word for span in SPANS for word in re.findall(r"(?<![\w/.-])[a-z]+(?:_[a-z]+)+\b", span)}
    assert words
    assert words - known == set()


def test_links_lead_to_headings() -> None:
    for file, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", TEXT):
        target = PAGE.parent / file if file else PAGE
        titles = re.findall(r"^#+ (.+)$", Path(target).read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
            heading
        )
    assert ENTRIES
