"""Models as their origins tell them: a catalog, a registration; and what the server's settings change."""

from __future__ import annotations

from pathlib import Path

from ..config import ModelConfig
from ..params import GenerationDefaults
from ..types import ModelState
from .catalog import CatalogEntry
from .entry import ModelEntry
from .registry import Registration


def configure(entry: ModelEntry, settings: ModelConfig) -> None:
    """Puts the server's settings for a model over its own."""
    entry.load_options = settings.load_options.over(entry.load_options)
    entry.defaults = _over(settings.defaults, entry.defaults)


def may_relist(entry: ModelEntry, item: CatalogEntry) -> bool:
    """Whether a model may be what a catalog tells now: not if it is a file of this server that it was not."""
    if item.path is not None or entry.is_embedded:
        return item.path is not None and entry.is_embedded
    return entry.source is not None


def relist(entry: ModelEntry, item: CatalogEntry, settings: ModelConfig | None) -> None:
    """A known model as a catalog tells it now. A file that is here stays until it is deleted."""
    entry.is_listed = True
    entry.description, entry.aliases = item.description, tuple(item.aliases)
    entry.defaults, entry.load_options = item.defaults, item.all_load_options
    entry.expected_sha256, entry.chat_template = item.sha256, item.chat_template
    entry.license, entry.gpu_note = item.license, item.gpu_note
    if entry.path is None and entry.pull is None:
        entry.source, entry.sha256, entry.size_bytes = item.source, item.sha256, item.size_bytes
    if settings is not None:
        configure(entry, settings)


def _over(own: GenerationDefaults, base: GenerationDefaults) -> GenerationDefaults:
    values = {name: getattr(own, name) for name in own.__struct_fields__}
    return GenerationDefaults(**{n: getattr(base, n) if v is None else v for n, v in values.items()})


def from_registration(registration: Registration) -> ModelEntry:
    """A registered file."""
    return ModelEntry(
        registration.name,
        Path(registration.path),
        False,
        aliases=tuple(registration.aliases),
        defaults=registration.defaults,
        load_options=registration.load_options,
        sha256=registration.sha256,
    )


def from_catalog(item: CatalogEntry) -> ModelEntry:
    """A model of a catalog, ABSENT unless it is embedded."""
    return ModelEntry(
        item.name,
        item.path,
        item.path is not None,
        item.description,
        tuple(item.aliases),
        item.defaults,
        item.all_load_options,
        sha256=item.sha256,
        size_bytes=item.size_bytes,
        state=ModelState.AVAILABLE if item.path is not None else ModelState.ABSENT,
        source=item.source,
        is_listed=True,
        expected_sha256=item.sha256,
        chat_template=item.chat_template,
        license=item.license,
        gpu_note=item.gpu_note,
    )
