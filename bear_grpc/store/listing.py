"""Which files of a repository a reference means; everything that the hub lists is checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import HubAnswerInvalid, InvalidField, ModelNotFound
from .reference import Reference, file_problem, is_commit

MAX_FILE_BYTES = 2**42
NEAREST = 3

# Taken in this order where no quantization is named: the usual one, smaller ones that still answer well,
# larger ones, and what is better than nothing.
USUAL_QUANTS = (
    *("Q4_K_M", "Q4_K_S", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K_L", "Q3_K_M"),
    *(
        "MXFP4",
        "MXFP4_MOE",
        "Q4_K_L",
        "UD-Q4_K_XL",
        "Q4_1",
        "Q5_K_S",
        "Q5_K_M",
        "Q5_0",
        "Q5_1",
        "Q6_K",
        "Q8_0",
    ),
    *("Q3_K_S", "Q2_K", "BF16", "F16", "FP16", "F32"),
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# The usual names of quantizations, at the end of a file's name.
_LABEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|FP?16|FP?32))\Z", re.IGNORECASE
)
# Files that accompany a model and are none.
_COMPANION = re.compile(r"(?:^|[-._])(?:mmproj|imatrix|adapter|lora)(?:[-._]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file, and what its bytes must be."""

    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model of the hub, pinned to its bytes; `revision` is as asked for, `files` are all parts in order."""

    name: str
    repo_id: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as the hub lists it, unchecked; None: the hub does not tell."""

    size_bytes: object
    sha256: object


def pin(reference: Reference, commit: object, listed: Mapping[str, Listed]) -> Resolved:
    """The files that the reference means. Raises ModelNotFound, InvalidField, HubAnswerInvalid."""
    if not isinstance(commit, str) or not is_commit(commit):
        raise HubAnswerInvalid(f"the commit of {reference.repo_id} is no commit")
    if is_commit(reference.revision) and commit != reference.revision:
        raise HubAnswerInvalid(f"asked for commit {reference.revision}, the hub tells of {commit}")
    files = sorted(file for file in listed if file.endswith(".gguf"))
    for file in files:
        if (problem := file_problem(file)) is not None:
            raise HubAnswerInvalid(f"a file of {reference.repo_id} has the name {file[:80]!r}: {problem}")
    if reference.file is None:
        chosen, reference = _choose(reference, files)
    else:
        chosen = _named(reference, reference.file, files)
    parts = tuple(_checked(file, listed[file]) for file in _parts(chosen, listed))
    return Resolved(reference.name, reference.repo_id, reference.revision, commit, parts)


def label_of(file: str) -> str:
    """The quantization that a file's name ends with, in upper case; "" where it names none."""
    match = _LABEL.search(_stem(file))
    return "" if match is None else match[1].upper()


def _named(reference: Reference, file: str, files: Sequence[str]) -> str:
    if file not in files:
        near = difflib.get_close_matches(file, files, NEAREST, cutoff=0.0)
        raise ModelNotFound(reference.name, [replace(reference, file=name).name for name in near])
    return file


def _choose(reference: Reference, files: Sequence[str]) -> tuple[str, Reference]:
    """The file of the quantization asked for, or of the usual one, and the reference that says which."""
    models = [file for file in files if _is_model(file)]
    if reference.quant is not None:
        return _of_quant(reference, reference.quant, models), reference
    labels = {label_of(file) for file in models}
    usual = next((quant for quant in USUAL_QUANTS if quant in labels), None)
    if usual is not None:
        named = replace(reference, quant=usual)
        return _of_quant(named, usual, models), named
    file = _only_one(reference, models, models)
    label = label_of(file)
    return file, replace(reference, quant=label) if label else replace(reference, file=file)


def _of_quant(reference: Reference, quant: str, models: Sequence[str]) -> str:
    exact = [file for file in models if label_of(file) == quant]
    ending = re.compile(rf"(?:^|[-._]){re.escape(quant)}\Z", re.IGNORECASE)
    # "M" is not the whole of Q4_K_M, but Q4_K_XL is that of UD-Q4_K_XL.
    loose = [
        file
        for file in models
        if ending.search(_stem(file)) and len(label_of(file).removeprefix("UD-")) <= len(quant)
    ]
    return _only_one(reference, exact or loose, models)


def _only_one(reference: Reference, found: Sequence[str], models: Sequence[str]) -> str:
    if not found:
        labels = sorted({label_of(file) for file in models} - {""})
        near = difflib.get_close_matches(reference.quant or "", labels, NEAREST, cutoff=0.0)
        raise ModelNotFound(reference.name, [replace(reference, quant=label).name for label in near])
    if len(found) > 1:
        more = f" and {len(found) - NEAREST} more" if len(found) > NEAREST else ""
        names = ", ".join(replace(reference, file=file, quant=None).name for file in found[:NEAREST])
        raise InvalidField("name", f"{reference.name} may be {names}{more}; name one of them")
    return found[0]


def _is_model(file: str) -> bool:
    """Whether a file can be opened as a model: no companion of one, no part but the first."""
    part = _PART.fullmatch(file)
    is_first = part is None or int(part["number"]) == 1
    return is_first and not _COMPANION.search(_stem(file))


def _stem(file: str) -> str:
    """The file's own name without its ending and without the number of its part."""
    name = file.rsplit("/", 1)[-1]
    part = _PART.fullmatch(name)
    return name.removesuffix(".gguf") if part is None else part["stem"]


def _parts(file: str, listed: Mapping[str, Listed]) -> list[str]:
    """All parts of the model that a file belongs to, in order."""
    part = _PART.fullmatch(file)
    if part is None:
        return [file]
    names = []
    for number in range(1, int(part["count"]) + 1):
        names.append(f"{part['stem']}-{number:05d}-of-{part['count']}.gguf")
        if names[-1] not in listed:
            raise HubAnswerInvalid(f"{names[-1]} is missing: the model is not complete there")
    if file not in names:
        raise HubAnswerInvalid(f"{file} is no part of a model")
    return names


def _checked(file: str, listed: Listed) -> HubFile:
    size, sha256 = listed.size_bytes, listed.sha256
    if sha256 is None:
        raise HubAnswerInvalid(f"{file} has no SHA-256 there, so that it cannot be verified")
    if not isinstance(sha256, str) or not is_sha256(sha256):
        raise HubAnswerInvalid(f"the SHA-256 of {file} is none")
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_FILE_BYTES:
        raise HubAnswerInvalid(f"the size of {file} is not 1 to {MAX_FILE_BYTES} bytes")
    return HubFile(file, sha256, size)


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 as it is written here: 64 hex digits in lower case."""
    return _SHA256.fullmatch(text) is not None
