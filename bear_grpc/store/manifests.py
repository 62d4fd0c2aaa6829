"""What has been pulled: one small file for each model, which names its blobs."""

from __future__ import annotations

import hashlib
import logging
import re
import urllib.parse
from pathlib import Path

import msgspec

from .files import write_whole
from .listing import is_sha256
from .reference import file_problem

log = logging.getLogger(__name__)

_CHECKSUM = re.compile(rb"[0-9a-f]{64}")
MAX_STEM_BYTES = 200  # file systems take 255 for a name, ours have endings


class ManifestFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file by its path in the repository, and what it is."""

    file: str
    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pulled model; `revision` is as asked for, `files` are all parts of a split model in order."""

    name: str
    repo_id: str
    revision: str
    commit: str
    files: list[ManifestFile]

    @property
    def is_split(self) -> bool:
        """Whether the model has several parts, which must lie beside each other under their own names."""
        return len(self.files) > 1

    @property
    def split_key(self) -> str:
        """What tells its parts from those of every other split model."""
        return hashlib.sha256("\n".join(file.sha256 for file in self.files).encode()).hexdigest()


class Manifests:
    """The manifests in a folder. Blocking calls, any thread; writers keep out of each other's way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> list[Manifest]:
        """All of them, by file; files that are none are told in the log."""
        found = [self._read(file) for file in sorted(self.folder.glob("*.json"))]
        return [manifest for manifest in found if manifest is not None]

    def checksums(self) -> set[str]:
        """All that any of them names, those that are no manifest included: nothing of theirs may go."""
        found: set[str] = set()
        for file in self.folder.glob("*.json"):
            found.update(match.decode() for match in _CHECKSUM.findall(file.read_bytes()))
        return found

    def find(self, name: str) -> Manifest | None:
        """The one of a model."""
        file = self._file(name)
        return self._read(file) if file.exists() else None

    def write(self, manifest: Manifest) -> None:
        """Adds or replaces one. Raises OSError."""
        write_whole(self._file(manifest.name), msgspec.json.format(msgspec.json.encode(manifest)))

    def remove(self, name: str) -> None:
        """Forgets a model; nothing if there is none."""
        self._file(name).unlink(missing_ok=True)

    def _read(self, file: Path) -> Manifest | None:
        try:
            manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError) as exc:
            log.warning("manifest %s is left out: %s", file, exc)
            return None
        if not _is_sound(manifest):
            log.warning("manifest %s is left out: a file in it has no name or no checksum", file)
            return None
        return manifest

    def _file(self, name: str) -> Path:
        # Names may hold `/` and `:`; quoted they are one plain file name.
        stem = urllib.parse.quote(name, safe="")
        if len(stem) > MAX_STEM_BYTES:
            digest = hashlib.sha256(name.encode()).hexdigest()
            stem = f"{stem[: MAX_STEM_BYTES - len(digest)]}{digest}"
        return self.folder / f"{stem}.json"


def _is_sound(manifest: Manifest) -> bool:
    """Whether its files can be paths on this machine."""
    return bool(manifest.files) and all(
        is_sha256(file.sha256) and file_problem(file.file) is None for file in manifest.files
    )
