"""The header of a model that is split into several files, put together from theirs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .gguf import MAX_TENSORS, GgufError, GgufHeader, read_header


def parts_of(first: Path, count: int) -> list[Path]:
    """The files of a model that is split, by the name of the first: llama.cpp finds them so, too.

    Raises GgufError if the name is not that of a first part.
    """
    end = f"-00001-of-{count:05}.gguf"
    if not first.name.endswith(end):
        raise GgufError(f"a part of {count} files, but its name does not end with {end}", 0)
    stem = first.name.removesuffix(end)
    return [first.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def read_headers(paths: Sequence[Path]) -> GgufHeader:
    """The header of a whole model from all its parts, in their order. Raises as `read_header`."""
    return join_parts([read_header(path) for path in paths])


def join_parts(parts: Sequence[GgufHeader]) -> GgufHeader:
    """What a split model is: its first part, with the tensors and the size of all of them.

    Raises GgufError if these are not all the parts of one model, in their order.
    """
    first = parts[0]
    if len(parts) != first.split_count:
        raise GgufError(f"{len(parts)} files, but the model is split into {first.split_count}", 0)
    if len(parts) == 1:
        return first
    for number, part in enumerate(parts):
        if (part.split_number, part.split_count) != (number, len(parts)):
            found = f"part {(part.split_number or 0) + 1} of {part.split_count}"
            raise GgufError(f"file {number + 1} of {len(parts)} is {found}", 0)
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    if len(tensors) > MAX_TENSORS:
        raise GgufError(f"{len(tensors):,} tensors in all parts, above the limit of {MAX_TENSORS:,}", 0)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GgufError("a tensor occurs in two parts", 0)
    declared = first.metadata.get("split.tensors.count")
    if declared is not None and declared != len(tensors):
        raise GgufError(f"{len(tensors):,} tensors in all parts, not {declared!r:.40}", 0)
    return replace(first, tensors=tensors, file_bytes=sum(part.file_bytes for part in parts))
