"""Models by name, alias and hub reference."""

from __future__ import annotations

import difflib

from ..errors import InvalidField, ModelExists, ModelNotFound
from ..store.reference import parse_reference
from .entry import ModelEntry

MAX_NAME_CHARS = 128


class Names:
    """The entries of a shelf, each under names that are nobody else's. Event loop only."""

    def __init__(self) -> None:
        self._entries: dict[str, ModelEntry] = {}

    def list(self) -> list[ModelEntry]:
        """Every model, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def add(self, entry: ModelEntry) -> None:
        """Makes a model known. Raises ModelExists."""
        self.check_free(entry.name, *entry.aliases)
        self._entries[entry.name] = entry

    def remove(self, entry: ModelEntry) -> None:
        """Forgets a model."""
        if self.is_known(entry):
            del self._entries[entry.name]

    def is_known(self, entry: ModelEntry) -> bool:
        """Whether it has not been forgotten, nor replaced by another one of its name."""
        return self._entries.get(entry.name) is entry

    def find(self, name: str) -> ModelEntry | None:
        """A model by name, by alias, or by a reference that is written in another way."""
        return self._exactly(name) or self._exactly(_canonical(name))

    def get(self, name: str) -> ModelEntry:
        """A model as `find` finds it. Raises ModelNotFound with the nearest names."""
        found = self.find(name)
        if found is not None:
            return found
        names = [known for entry in self._entries.values() for known in (entry.name, *entry.aliases)]
        # The search for similar names takes as long as the name is.
        near = difflib.get_close_matches(name, names, n=3) if len(name) <= MAX_NAME_CHARS else []
        raise ModelNotFound(name, near)

    def own_name(self, name: str) -> str:
        """The name of the model that `name` means, or that it would have if there were one."""
        found = self.find(name)
        return _canonical(name) if found is None else found.name

    def by_own_name(self, name: str) -> ModelEntry:
        """A model by its name only. Raises ModelNotFound, and InvalidField for an alias."""
        entry = self._entries.get(name)
        if entry is None:
            self.get(name)
            raise InvalidField("name", "must be the model's name, not an alias")
        return entry

    def check_free(self, *names: str) -> None:
        """Raises ModelExists if one of them is taken."""
        for name in names:
            if self._exactly(name) is not None:
                raise ModelExists(name)

    def _exactly(self, name: str) -> ModelEntry | None:
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        return next((entry for entry in self._entries.values() if name in entry.aliases), None)


def _canonical(name: str) -> str:
    """The name that a hub reference has on this server; other names as they are."""
    try:
        reference = parse_reference(name)
    except InvalidField:
        return name
    return name if reference is None else reference.name
