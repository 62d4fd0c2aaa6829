"""Reads the header of an untrusted GGUF file, here or elsewhere, and checks that the file is all there.

Pure Python, so that a hostile file costs an exception and not the process. The rules are those of llama.cpp's
own parser (ggml/src/gguf.cpp). Knows nothing of engines, of the store or of the API.
"""

import errno
import os
import stat
from collections.abc import Container
from math import inf, prod
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

from .gguf_types import SCALAR_TYPES, TENSOR_TYPES, ArraySummary, GgufHeader, MetadataValue, TensorInfo

__all__ = [
    "ArraySummary",
    "GgufError",
    "GgufHeader",
    "MetadataValue",
    "Source",
    "TensorInfo",
    "read_header",
    "read_header_from",
]

# What a file may cost: below 50 MB of memory and a second. Honest headers have tens of entries, up to a few
# thousand tensors, and up to a million strings: the largest vocabularies with their merges.
MAX_ENTRIES = 4_096
MAX_TENSORS = 32_768
MAX_KEY_BYTES = 256
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME less the closing NUL
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_ARRAY_STRINGS = 2_000_000  # in all arrays together
MAX_TEXT_BYTES = 2 << 20  # kept of all strings together; one that does not fit is summarised
MAX_READ_BYTES = 64 << 20
KEPT_ARRAY_LENGTH = 16
KEPT_INTEGERS = 1_024  # of one array: numbers of layers
MAX_KEPT_INTEGERS = 65_536  # of all arrays longer than KEPT_ARRAY_LENGTH together
# A read of a file elsewhere is a request: few for a long header, and little too much for a short one.
FIRST_READ_BYTES, LARGEST_READ_BYTES = 256 << 10, 1 << 20
_STRING_TYPE, _ARRAY_TYPE = 8, 9
_REAL_TYPES = (6, 12)
_U32, _U64 = Struct("<I"), Struct("<Q")


class GgufError(Exception):
    """The file cannot be loaded: `problem` says what is wrong with it, `offset` at which byte."""

    def __init__(self, problem: str, offset: int) -> None:
        super().__init__(f"{problem} (byte {offset:,})")
        self.problem = problem
        self.offset = offset


class Source(Protocol):
    """A file whose bytes can be had in ranges: on this machine, or of a server."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, which lie within the file; fewer only if it became shorter."""


class _OpenFile:
    def __init__(self, fd: int, size: int) -> None:
        self._fd, self.size = fd, size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._fd, count, offset)


def read_header(path: Path) -> GgufHeader:
    """The checked header of a file. No weights are read.

    Raises:
        GgufError: not a regular file, not GGUF, cut short, inconsistent, or beyond the bounds above.
        OSError: it cannot be opened or read (FileNotFoundError, PermissionError, ...).
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket, on Linux and on macOS
            raise GgufError("not a regular file", 0) from exc
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise GgufError("not a regular file", 0)
        return read_header_from(_OpenFile(fd, status.st_size))
    finally:
        os.close(fd)


def read_header_from(source: Source) -> GgufHeader:
    """The checked header of a file that may be elsewhere, in few and growing reads.

    Raises GgufError as `read_header`, and whatever the source raises.
    """
    return _Reader(source).read_header()


class _Reader:
    """Walks a file once, front to back, through a window. `_at` is where the last number read begins."""

    def __init__(self, source: Source) -> None:
        self._source, self._size = source, source.size
        self._read_size = FIRST_READ_BYTES
        self._position = self._at = 0
        self._window, self._window_start = b"", 0
        self._bytes_left, self._text_left = MAX_READ_BYTES, MAX_TEXT_BYTES
        self._strings_left, self._integers_left = MAX_ARRAY_STRINGS, MAX_KEPT_INTEGERS

    def read_header(self) -> GgufHeader:
        if self._size == 0:
            raise GgufError("the file is empty", 0)
        version = self._read_version()
        tensor_count = self._read_number(_U64, "the number of tensors", MAX_TENSORS)
        metadata: dict[str, MetadataValue] = {}
        alignment = 32  # GGUF_DEFAULT_ALIGNMENT
        for index in range(self._read_number(_U64, "the number of metadata entries", MAX_ENTRIES)):
            key = self._read_name(f"metadata key {index}", MAX_KEY_BYTES, metadata)
            metadata[key] = value = self._read_value(repr(key))
            if key == "general.alignment":
                if type(value) is not int or value <= 0 or value & (value - 1):
                    raise self._error("general.alignment is no power of two")
                alignment = value
        tensors = self._read_tensors(tensor_count, alignment)
        data_offset = self._position + (-self._position % alignment if tensors else 0)
        for tensor in tensors:
            if data_offset + tensor.offset + tensor.byte_count > self._size:
                lack = data_offset + tensors[-1].offset + tensors[-1].byte_count - self._size
                problem = f"the file is cut short before or in tensor {tensor.name!r}, by {lack:,} bytes"
                raise GgufError(problem, self._size)
        return GgufHeader(version, metadata, tensors, data_offset, alignment, self._size)

    def _read_version(self) -> int:
        magic = self._read_bytes(4, "the magic")
        if magic != b"GGUF":
            raise self._error(f"not a GGUF file: it begins with {magic!r}")
        version: int = self._read_number(_U32, "the version")
        if version and not version & 0xFFFF:  # the test of llama.cpp
            raise self._error("a big-endian GGUF file, which this machine cannot load")
        if version == 1:
            raise self._error("GGUF version 1 is no longer supported: convert the model again")
        if version not in (2, 3):
            raise self._error(f"unknown GGUF version {version:,}: 2 and 3 are supported")
        return version

    def _read_value(self, key: str) -> MetadataValue:
        value_type = self._read_number(_U32, f"the type of {key}")
        if value_type in SCALAR_TYPES:
            value: MetadataValue = self._read_number(SCALAR_TYPES[value_type][1], f"the value of {key}")
            return value
        if value_type == _STRING_TYPE:
            return self._read_text(f"the value of {key}")
        if value_type == _ARRAY_TYPE:
            return self._read_array(f"the array {key}")
        raise self._error(f"{key} has the unknown value type {value_type}")

    def _read_array(self, what: str) -> MetadataValue:
        element_type = self._read_number(_U32, what)
        if element_type != _STRING_TYPE and element_type not in SCALAR_TYPES:
            kind = "nested" if element_type == _ARRAY_TYPE else "unknown"
            raise self._error(f"{what} has the {kind} element type {element_type}")
        count = self._read_number(_U64, what)
        # Each string takes at least its length.
        name, number = SCALAR_TYPES.get(element_type, ("string", _U64))
        if count * number.size > self._size - self._position:
            raise self._error(f"{what} has {count:,} entries, more than the rest of the file can hold")
        summary = ArraySummary(name, count)
        if element_type != _STRING_TYPE:
            if count <= KEPT_ARRAY_LENGTH or self._can_keep(element_type, count):
                return tuple(self._read_number(number, what) for _ in range(count))
            self._position += count * number.size
            return summary
        self._strings_left -= count
        if self._strings_left < 0:
            raise self._error(f"{what} takes the file above {MAX_ARRAY_STRINGS:,} strings")
        if count <= KEPT_ARRAY_LENGTH:
            texts = [self._read_text(f"a string of {what}") for _ in range(count)]
            kept = tuple(text for text in texts if isinstance(text, str))
            return kept if len(kept) == count else summary
        self._skip_strings(count, what)
        return summary

    def _can_keep(self, element_type: int, count: int) -> bool:
        if element_type in _REAL_TYPES or count > min(KEPT_INTEGERS, self._integers_left):
            return False
        self._integers_left -= count
        return True

    def _read_tensors(self, count: int, alignment: int) -> tuple[TensorInfo, ...]:
        tensors: dict[str, TensorInfo] = {}
        data_end = 0
        for index in range(count):
            name = self._read_name(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES, tensors)
            tensor = tensors[name] = self._read_tensor(name)
            if tensor.offset % alignment:
                raise self._error(f"tensor {name!r} has offset {tensor.offset:,}, no multiple of {alignment}")
            if tensor.offset != data_end:
                place = "outside the file" if tensor.offset > self._size else "out of place"
                raise self._error(f"tensor {name!r} has offset {tensor.offset:,}, {place}: not {data_end:,}")
            data_end = tensor.offset + tensor.byte_count
            data_end += -data_end % alignment
        return tuple(tensors.values())

    def _read_tensor(self, name: str) -> TensorInfo:
        what = f"tensor {name!r}"
        dimensions = self._read_number(_U32, f"the number of dimensions of {what}", MAX_DIMENSIONS)
        shape = tuple(self._read_number(_U64, what) for _ in range(dimensions))
        elements = prod(shape)
        if not 0 < elements < 2**63:
            raise self._error(f"{what} has the impossible shape {shape}")
        type_id = self._read_number(_U32, what)
        if type_id not in TENSOR_TYPES:
            raise self._error(f"{what} has the unknown type {type_id}")
        type_name, block, block_bytes = TENSOR_TYPES[type_id]
        if shape[:1] and shape[0] % block:
            raise self._error(f"{what} of type {type_name} has rows of {shape[0]:,}, no multiple of {block}")
        offset = self._read_number(_U64, what)
        return TensorInfo(name, type_name, shape, elements, offset, elements // block * block_bytes)

    def _read_name(self, what: str, limit: int, taken: Container[str]) -> str:
        length = self._read_number(_U64, f"the length of {what}")
        if not 0 < length <= limit:
            raise self._error(f"{what} has {length:,} bytes, not 1 to {limit}")
        try:
            name = self._read_bytes(length, what).decode()
        except UnicodeDecodeError as exc:
            raise self._error(f"{what} is not UTF-8") from exc
        if name in taken:
            raise self._error(f"{what}, {name!r}, occurs twice")
        return name

    def _read_text(self, what: str) -> str | ArraySummary:
        length = self._read_number(_U64, what)
        if length > self._size - self._position:
            raise self._error(f"{what} has {length:,} bytes, more than the rest of the file")
        if length > self._text_left:
            self._position += length
            return ArraySummary("byte", length)
        self._text_left -= length
        return self._read_bytes(length, what).decode(errors="replace")

    def _skip_strings(self, count: int, what: str) -> None:
        """Steps over strings: the one loop that runs a million times for an honest file."""
        unpack, position, start, end = _U64.unpack_from, self._position, 0, 0
        for _ in range(count):
            if position + 8 > end:
                self._position = position
                self._load(8, what)
                start, end = self._window_start, self._window_start + len(self._window)
            (length,) = unpack(self._window, position - start)
            if length > self._size - position - 8:
                raise GgufError(f"{what} has a string of {length:,} bytes, past the file's end", position)
            position += 8 + length
        self._position = position

    def _read_number(self, number: Struct, what: str, limit: float = inf) -> Any:
        index = self._load(number.size, what)
        self._at = self._position
        self._position += number.size
        value = number.unpack_from(self._window, index)[0]
        if value > limit:
            raise self._error(f"{what} is {value:,}, above the limit of {limit:,}")
        return value

    def _read_bytes(self, count: int, what: str) -> bytes:
        index = self._load(count, what)
        self._position += count
        return self._window[index : index + count]

    def _load(self, count: int, what: str) -> int:
        """Brings the next bytes into the window and gives their index in it."""
        index = self._position - self._window_start
        if index + count <= len(self._window):
            return index
        if count > self._size - self._position:
            raise GgufError(f"the file ends inside {what}", self._position)
        if self._bytes_left <= 0:
            raise GgufError(f"the header takes more than {MAX_READ_BYTES:,} bytes", self._position)
        wanted = min(max(count, self._read_size), self._size - self._position)
        self._window, self._window_start = self._source.read(self._position, wanted), self._position
        self._read_size = min(2 * self._read_size, LARGEST_READ_BYTES)
        self._bytes_left -= len(self._window)
        if len(self._window) < count:
            raise GgufError("the file became shorter while it was read", self._position)
        return 0

    def _error(self, problem: str) -> GgufError:
        return GgufError(problem, self._at)
