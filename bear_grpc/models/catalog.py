"""The models that are known without being registered: the package's `catalog.toml`, and the user's own."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from ..config import ConfigError
from ..errors import FieldViolation, InvalidField
from ..params import GenerationDefaults
from ..store.reference import check_source
from ..types import HubSource, LoadOptions

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
MAX_TEMPLATE_CHARS = 2**18
MAX_SIZE_BYTES = 2**42
_PACKAGE = Path(__file__).parent.parent
_OWN = Path(__file__).with_name("catalog.toml")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model that is known without being registered.

    Its file comes from `source` on the hub, or is `embedded`, a path in the
    package. `chat_template` takes the place of the file's own. `sha256` is checked where it
    is given; `size_bytes` is told until the hub tells it.
    """

    name: str
    description: str
    source: HubSource | None = None
    embedded: str = ""
    aliases: list[str] = []
    sha256: str = ""
    size_bytes: int = 0
    defaults: GenerationDefaults = GenerationDefaults()
    load_options: LoadOptions = LoadOptions()
    chat_template: str | None = None
    keep_alive_s: float | None = None  # after the last use; negative: for ever
    pinned: bool | None = None
    license: str = ""
    gpu_note: str = ""

    @property
    def path(self) -> Path | None:
        """Where its embedded file is."""
        return _PACKAGE / self.embedded if self.embedded else None

    @property
    def all_load_options(self) -> LoadOptions:
        """The load options with `keep_alive_s` and `pinned`."""
        return LoadOptions(keep_alive_s=self.keep_alive_s, pinned=self.pinned).over(self.load_options)

    def violations(self) -> list[FieldViolation]:
        """All fields that are wrong, the source's and the options' included."""
        names = {"name": self.name, **{f"aliases[{place}]": name for place, name in enumerate(self.aliases)}}
        found = [
            FieldViolation(field, f"must match {MODEL_NAME.pattern}")
            for field, name in names.items()
            if not MODEL_NAME.fullmatch(name)
        ]
        if (self.source is None) == (not self.embedded):
            found.append(FieldViolation("source", "is required"))
        if self.source is not None:
            try:
                check_source(self.source)
            except InvalidField as exc:
                found += exc.violations
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            found.append(FieldViolation("sha256", "must be 64 hexadecimal digits in lower case"))
        if not 0 <= self.size_bytes <= MAX_SIZE_BYTES:
            found.append(FieldViolation("size_bytes", f"must be 0 to {MAX_SIZE_BYTES}, is {self.size_bytes}"))
        if self.chat_template is not None and not 1 <= len(self.chat_template) <= MAX_TEMPLATE_CHARS:
            limit = f"must have 1 to {MAX_TEMPLATE_CHARS} characters, has {len(self.chat_template)}"
            found.append(FieldViolation("chat_template", limit))
        for name in ("keep_alive_s", "load_options.keep_alive_s"):
            value = self.keep_alive_s if name == "keep_alive_s" else self.load_options.keep_alive_s
            if value is not None and not math.isfinite(value):
                found.append(FieldViolation(name, f"must be a number of seconds, is {value}"))
        return found + self.load_options.violations("load_options") + self.defaults.violations()


def read_catalog(user: Path | None = None) -> list[CatalogEntry]:
    """The package's catalog with the user's own over it: an equal name replaces the package's entry.

    Blocking. Raises ConfigError naming the file, the model and the field.
    """
    entries = {entry.name: entry for entry in _read(_OWN)}
    if user is not None:
        own = _read(user)
        for entry in own:
            if entry.embedded:
                raise ConfigError(f"{user}: model {entry.name}: embedded: is for the package's own models")
        entries.update({entry.name: entry for entry in own})
    _check_names(user or _OWN, list(entries.values()))
    return list(entries.values())


def _read(file: Path) -> list[CatalogEntry]:
    try:
        whole = msgspec.toml.decode(file.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    unknown = sorted(set(whole) - {"model"})
    if unknown:
        raise ConfigError(f"{file}: {unknown[0]}: is unknown; models are written as [[model]]")
    models = whole.get("model", [])
    if not isinstance(models, list):
        raise ConfigError(f"{file}: model: must be written as [[model]]")
    entries = [_entry(file, place, item) for place, item in enumerate(models, 1)]
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{file}: model {twice}: name: is there twice")
    return entries


def _entry(file: Path, place: int, item: Any) -> CatalogEntry:
    named = item.get("name") if isinstance(item, dict) else None
    where = f"{file}: model {named if isinstance(named, str) else f'number {place}'}"
    try:
        entry = msgspec.convert(item, CatalogEntry)
    except msgspec.ValidationError as exc:
        problem, _, path = str(exc).partition(" - at `$.")
        raise ConfigError(f"{where}: {f'{path[:-1]}: ' if path else ''}{problem}") from exc
    violations = entry.violations()
    if violations:
        raise ConfigError(f"{where}: " + "; ".join(f"{v.field}: {v.description}" for v in violations))
    return entry


def _check_names(file: Path, entries: list[CatalogEntry]) -> None:
    """Raises ConfigError where an alias is another model's name or alias."""
    owners = {entry.name: entry.name for entry in entries}
    for entry in entries:
        for alias in entry.aliases:
            owner = owners.setdefault(alias, entry.name)
            if owner != entry.name or alias == entry.name:
                raise ConfigError(f"{file}: model {entry.name}: aliases: {alias!r} is a name of {owner}")
