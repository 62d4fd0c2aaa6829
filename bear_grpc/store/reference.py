"""Names of models on the hub, and what a repository, a file and a revision may be called.

Everything that a caller names is checked here, before it becomes part of a
URL or of a path on the disk; what the hub answers is checked by the same rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import FieldViolation, InvalidField
from ..types import HubSource

DEFAULT_REVISION = "main"
MAX_REPO_ID_LENGTH = 96
MAX_FILE_LENGTH = 512
MAX_FILE_PART_BYTES = 255  # what file systems take

# A part of a repository's id begins and ends with a letter, a digit or an underscore: the hub's own rule.
_REPO_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_REPO_PART}/{_REPO_PART}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"\w[\w.\-/]{0,127}", re.ASCII)
_QUANT = re.compile(r"[A-Za-z0-9_.-]{1,32}")

_PREFIX = re.compile(r"(?:https://)?(?:hf\.co|huggingface\.co)/")
_WHOLE_REPOSITORY = re.compile(
    r"(?P<repo_id>[^/:@]+/[^/:@]+)(?::(?P<quant>[^/@]*))?(?:@(?P<revision>[^@]*))?"
)
_ONE_FILE = re.compile(
    r"(?P<repo_id>[^/]+/[^/]+)/(?P<file>.*?)(?:(?<=\.gguf)@(?P<revision>[^@]*))?", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a name on the hub stands for: a file, a quantization, or the repository's usual one (neither)."""

    repo_id: str
    file: str | None = None
    quant: str | None = None
    revision: str = DEFAULT_REVISION

    def __post_init__(self) -> None:
        # They are found without regard to case: one model must not have two names.
        if self.quant is not None:
            object.__setattr__(self, "quant", self.quant.upper())

    @property
    def name(self) -> str:
        """The model's name; `parse_reference` gives an equal reference back."""
        name = self.repo_id
        if self.file is not None:
            name += f"/{self.file}"
        elif self.quant is not None:
            name += f":{self.quant}"
        # A file may be called "a.gguf@b.gguf": then even the usual revision must be written.
        if self.revision != DEFAULT_REVISION or ".gguf@" in (self.file or ""):
            name += f"@{self.revision}"
        return name


def parse_reference(name: str) -> Reference | None:
    """The reference that a model's name is, None where it cannot be one (it has no "/").

    Forms: owner/repo:QUANT, owner/repo, owner/repo/folder/file.gguf, each with an optional @revision;
    the hub's address before it is taken off. Raises InvalidField for "name".
    """
    if "/" not in name:
        return None
    bare = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
    match = _WHOLE_REPOSITORY.fullmatch(bare) or _ONE_FILE.fullmatch(bare)
    if match is None:
        raise InvalidField("name", "must be owner/repo:QUANT or owner/repo/file.gguf")
    found = match.groupdict()
    revision = found["revision"]
    reference = Reference(
        found["repo_id"],
        found.get("file"),
        found.get("quant"),
        DEFAULT_REVISION if revision is None else revision,
    )
    problems = [
        repo_id_problem(reference.repo_id),
        None if reference.file is None else file_problem(reference.file),
        None if reference.quant is None else quant_problem(reference.quant),
        revision_problem(reference.revision),
    ]
    violations = [FieldViolation("name", problem) for problem in problems if problem is not None]
    if violations:
        raise InvalidField.of(violations)
    return reference


def check_source(source: HubSource, prefix: str = "source") -> None:
    """Raises InvalidField naming every field of the source that is wrong, as in `source.file`."""
    problems = {
        "repo_id": repo_id_problem(source.repo_id),
        "file": file_problem(source.file),
        "revision": revision_problem(source.revision),
    }
    violations = [
        FieldViolation(f"{prefix}.{field}", problem)
        for field, problem in problems.items()
        if problem is not None
    ]
    if violations:
        raise InvalidField.of(violations)


def repo_id_problem(repo_id: str) -> str | None:
    """What is wrong with a repository's id, None if nothing."""
    if len(repo_id) > MAX_REPO_ID_LENGTH:
        return f"the repository's id must have at most {MAX_REPO_ID_LENGTH} characters"
    if not _REPO_ID.fullmatch(repo_id):
        return "the repository's id must be owner/repo, each of letters, digits, '.', '_' and '-'"
    if ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        return "the repository's id must not contain '..' or '--', nor end with '.git'"
    return None


def file_problem(file: str) -> str | None:
    """What is wrong with a file's path in a repository, None if nothing."""
    parts = file.split("/")
    if not file.endswith(".gguf"):
        return "the file must end with .gguf"
    if len(file) > MAX_FILE_LENGTH:
        return f"the file must have at most {MAX_FILE_LENGTH} characters"
    if "\\" in file or not file.isprintable():
        return "the file must not contain backslashes or characters that cannot be printed"
    if not {"", ".", ".."}.isdisjoint(parts):
        return "the file must be a relative path without empty, '.' or '..' parts"
    if any(len(part.encode()) > MAX_FILE_PART_BYTES for part in parts):
        return f"each part of the file's path must have at most {MAX_FILE_PART_BYTES} bytes"
    return None


def revision_problem(revision: str) -> str | None:
    """What is wrong with a revision, None if nothing."""
    if ".." in revision or not _REVISION.fullmatch(revision):
        return "the revision must be a branch, a tag or a commit: letters, digits, '_', '.', '-' and '/'"
    return None


def quant_problem(quant: str) -> str | None:
    """What is wrong with a quantization's name, None if nothing."""
    if not _QUANT.fullmatch(quant):
        return "the quantization must be 1 to 32 letters, digits, '_', '.' or '-', as in Q4_K_M"
    return None


def is_commit(revision: str) -> bool:
    """Whether a revision can only ever mean the same bytes."""
    return _COMMIT.fullmatch(revision) is not None
