"""Registered models on disk: one small file each, so that they outlive the server."""

from __future__ import annotations

import logging
import urllib.parse
from pathlib import Path

import msgspec

from ..params import GenerationDefaults
from ..store.files import write_whole
from ..types import LoadOptions

log = logging.getLogger(__name__)


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GGUF file under a name. `sha256` is empty until it has been computed."""

    name: str
    path: str
    aliases: list[str] = []
    defaults: GenerationDefaults = GenerationDefaults()
    load_options: LoadOptions = LoadOptions()
    sha256: str = ""


class Registry:
    """The registrations in a folder. Blocking calls: not for the event loop's thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> list[Registration]:
        """All of them, by name; files that are no registration are told in the log."""
        found = []
        for file in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else []:
            try:
                found.append(msgspec.json.decode(file.read_bytes(), type=Registration))
            except (OSError, msgspec.MsgspecError) as exc:
                log.warning("registration %s is left out: %s", file, exc)
        return found

    def write(self, registration: Registration) -> None:
        """Adds or replaces a registration. Raises OSError."""
        write_whole(self._file(registration.name), msgspec.json.format(msgspec.json.encode(registration)))

    def remove(self, name: str) -> None:
        """Forgets a registration; nothing if there is none."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        # Names may hold `/` and `:`; quoted they are one plain file name.
        return self._folder / f"{urllib.parse.quote(name, safe='')}.json"
