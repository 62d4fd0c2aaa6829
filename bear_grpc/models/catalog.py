"""The models that ship with the service, from `catalog.toml`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..params import GenerationDefaults
from ..types import LoadOptions

_PACKAGE = Path(__file__).parent.parent


class CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model that is known without being registered. `embedded` is a path in the package."""

    name: str
    description: str
    embedded: str
    aliases: list[str] = []
    defaults: GenerationDefaults = GenerationDefaults()
    load_options: LoadOptions = LoadOptions()

    @property
    def path(self) -> Path:
        """Where its file is."""
        return _PACKAGE / self.embedded


class _Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: list[CatalogEntry]


def read_catalog() -> list[CatalogEntry]:
    """All entries of the package's catalog."""
    text = Path(__file__).with_name("catalog.toml").read_bytes()
    return msgspec.toml.decode(text, type=_Catalog).model
