"""Models that are spoiled where the header reader cannot tell: their values are well formed, and wrong."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from bear_grpc.models.gguf import GgufError, read_header_from
from tests.helpers.gguf_headers import BytesSource
from tests.helpers.ggufs import Span, spans

_NUMBERS = (0, 1, 2, 3, 5, 7, 8, 31, 32, 63, 64, 100, 255, 256, 1000, 2**15, 2**16, 2**31 - 1, 2**32 - 1)
_FLOATS = (0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"))
_DATA_BYTES = 512


class Mutator:
    """Mutants of one valid file, by a seed."""

    def __init__(self, path: Path, seed: int) -> None:
        self._whole = path.read_bytes()
        self._draw = random.Random(seed)
        found = spans(path)
        self._kinds: dict[str, list[Span]] = {}
        for span in found:
            self._kinds.setdefault(span.kind, []).append(span)

    def mutants(self) -> Iterator[bytes]:
        """Without end; each has one to three changes."""
        changes = (
            self._value,
            self._value,
            self._value,
            self._name,
            self._text,
            self._shape,
            self._type,
            self._data,
        )
        while True:
            data = bytearray(self._whole)
            for _ in range(self._draw.choice((1, 1, 2, 3))):
                self._draw.choice(changes)(data)
            yield bytes(data)

    def _one(self, kinds: Sequence[str]) -> Span:
        return self._draw.choice([span for kind in kinds for span in self._kinds.get(kind, ())])

    def _value(self, data: bytearray) -> None:
        """A number of the metadata."""
        span = self._one(["value"])
        if self._draw.random() < 0.2 and span.size == 4:
            data[span.start : span.end] = struct.pack("<f", self._draw.choice(_FLOATS))
        else:
            number = self._draw.choice(_NUMBERS) & (256**span.size - 1)
            data[span.start : span.end] = number.to_bytes(span.size, "little")

    def _name(self, data: bytearray) -> None:
        """A key of the metadata or a tensor's name: what it was is missing."""
        span = self._one(["name", "key"])
        place = self._draw.randrange(span.start, span.end)
        data[place] = self._draw.choice(b"abcxyz.0123_")

    def _text(self, data: bytearray) -> None:
        """Bytes of a text or of an array."""
        span = self._one(["string", "array of strings", "array of numbers"])
        for _ in range(self._draw.randint(1, 8)):
            if span.size:
                data[self._draw.randrange(span.start, span.end)] = self._draw.choice(b"\x00\x01 a{%\x7f\xff")

    def _shape(self, data: bytearray) -> None:
        """A dimension of a tensor, halved, doubled or turned around."""
        span = self._one(["dimensions"])
        sizes = list(struct.unpack_from(f"<{span.size // 8}Q", data, span.start))
        if self._draw.random() < 0.5:
            sizes.reverse()
        else:
            place = self._draw.randrange(len(sizes))
            sizes[place] = max(1, self._draw.choice((sizes[place] // 2, sizes[place] - 1, sizes[place] // 4)))
        struct.pack_into(f"<{len(sizes)}Q", data, span.start, *sizes)

    def _type(self, data: bytearray) -> None:
        """A tensor's type: half as many bytes, or numbers of another kind."""
        span = self._one(["tensor type"])
        struct.pack_into("<I", data, span.start, self._draw.choice((0, 1, 8, 24, 26, 30)))

    def _data(self, data: bytearray) -> None:
        """Some weights: random bits, NaN among them."""
        span = self._one(["data"])
        size = min(span.size, _DATA_BYTES)
        start = self._draw.randrange(span.start, span.end - size + 1)
        data[start : start + size] = self._draw.choice((self._draw.randbytes(size), b"\xff" * size))


def passing(path: Path, seed: int) -> Iterator[bytes]:
    """Mutants that the header reader takes."""
    for data in Mutator(path, seed).mutants():
        try:
            read_header_from(BytesSource(data))
        except GgufError:
            continue
        yield data
