"""A model file on the hub, looked at without downloading it: its header comes by ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelFileInvalid
from ..store.listing import HubFile, Resolved
from ..store.reference import Reference
from ..types import HubSource, ModelFile, ModelState
from .entry import ModelEntry
from .gguf import GgufError, read_header_from
from .gguf_parts import join_parts
from .gguf_types import GgufHeader

if TYPE_CHECKING:
    from ..store.hub import Hub


class RemoteFile:
    """A `gguf.Source`: what is asked for comes from the hub. Blocking."""

    def __init__(self, hub: Hub, model: Resolved, file: HubFile) -> None:
        self._hub = hub
        self._model = model
        self._file = file

    @property
    def size(self) -> int:
        return self._file.size_bytes

    def read(self, offset: int, count: int) -> bytes:
        return self._hub.read(self._model.repo_id, self._file, self._model.commit, offset, count)


def look_at(hub: Hub, reference: Reference) -> ModelEntry:
    """An entry for a model that is on the hub only, on no shelf. Blocking.

    Raises what `Hub.resolve` raises, and ModelFileInvalid.
    """
    model = hub.resolve(reference)
    first = model.files[0]
    return ModelEntry(
        reference.name,
        None,
        False,
        source=HubSource(model.repo_id, first.file, model.commit),
        files=tuple(ModelFile(file.file, file.sha256, file.size_bytes) for file in model.files),
        sha256=first.sha256 if len(model.files) == 1 else "",
        size_bytes=sum(file.size_bytes for file in model.files),
        header=_header(hub, model),
        state=ModelState.ABSENT,
    )


def _header(hub: Hub, model: Resolved) -> GgufHeader:
    try:
        return join_parts([read_header_from(RemoteFile(hub, model, file)) for file in model.files])
    except GgufError as exc:
        raise ModelFileInvalid(reference_text(model), exc.problem, exc.offset) from exc


def reference_text(model: Resolved) -> str:
    """The first file of a model, as a person would write it."""
    return f"{model.repo_id}/{model.files[0].file}"
