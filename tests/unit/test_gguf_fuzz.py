"""No bytes make the header reader do more than refuse: random ones, near ones, and those of spoiled files."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bear_grpc
from bear_grpc.models.gguf import GgufError, GgufHeader, read_header, read_header_from
from tests.helpers.architectures import write_architecture
from tests.helpers.gguf_headers import BytesSource, properties_of
from tests.helpers.ggufs import spans, write_tiny_llama

DEMO = Path(bear_grpc.__file__).parent / "demo" / "bear-demo.gguf"
MEMORY_LIMIT = 50_000_000
TIME_LIMIT_S = 5.0
"""For any one header; the bounds of the reader keep it far below, also on a busy machine."""

FEW, MANY = 350, 3_500
"""Cases of each kind: three kinds make 1,000 in the fast tests, and above 10,000 in the slow ones."""

EDGES = (0, 1, 2, 7, 8, 9, 12, 13, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
KEYS = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "split.count",
    "split.no",
    "tokenizer.ggml.tokens",
    "tokenizer.chat_template",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
)


def assert_contained(data: bytes, hidden: int = 0) -> None:
    """The reader answers or refuses, in little memory and time; an answer can be asked anything."""
    tracemalloc.start()
    began = time.monotonic()
    try:
        outcome: GgufHeader | GgufError = read_header_from(BytesSource(data, hidden))
    except GgufError as exc:
        outcome = exc
    seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_LIMIT
    assert seconds < TIME_LIMIT_S
    if isinstance(outcome, GgufError):
        assert outcome.problem
        assert 0 <= outcome.offset <= len(data) + hidden
    else:
        properties_of(outcome)


# Random bytes, most of them behind a beginning that is right


BEGINNINGS = st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF" + struct.pack("<IQQ", 3, 1, 1)])
RANDOM = st.tuples(BEGINNINGS, st.binary(max_size=256)).map(b"".join)

# Headers that are well formed but for their values


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


INTEGERS = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**64 - 1))
SCALARS = st.one_of(
    st.tuples(st.just(4), INTEGERS.map(lambda number: struct.pack("<I", number & 0xFFFFFFFF))),
    st.tuples(st.just(5), INTEGERS.map(lambda number: struct.pack("<I", number & 0xFFFFFFFF))),
    st.tuples(st.just(7), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just(8), st.binary(max_size=40).map(text)),
    st.tuples(st.just(8), st.just(text(b"llama"))),
    st.tuples(st.just(10), INTEGERS.map(lambda number: struct.pack("<Q", number))),
    st.tuples(st.just(12), st.floats().map(lambda number: struct.pack("<d", number))),
)
ARRAYS = st.tuples(
    st.sampled_from([4, 5, 7, 8, 9, 10, 99]), INTEGERS, st.integers(0, 40), st.binary(max_size=400)
).map(
    lambda made: (
        9,
        struct.pack("<IQ", made[0], made[1] if made[2] > 30 else made[2]) + made[3],
    )
)
ENTRIES = st.tuples(
    st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), st.one_of(SCALARS, SCALARS, ARRAYS)
).map(lambda made: text(made[0].encode("utf-8", "ignore")) + struct.pack("<I", made[1][0]) + made[1][1])
TENSORS = st.tuples(
    st.text(max_size=20),
    st.lists(INTEGERS, max_size=5),
    st.sampled_from([0, 1, 2, 8, 12, 14, 30, 4, 99]),
    st.sampled_from([0, 32, 64, 128, 2**40, 2**64 - 1]),
).map(
    lambda made: (
        text(made[0].encode("utf-8", "ignore"))
        + struct.pack(f"<I{len(made[1])}QIQ", len(made[1]), *made[1], made[2], made[3])
    )
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    entries, tensors = draw(st.lists(ENTRIES, max_size=6)), draw(st.lists(TENSORS, max_size=4))
    counts = len(tensors), len(entries)
    if draw(st.booleans()) and draw(st.booleans()):
        counts = draw(INTEGERS), draw(INTEGERS)
    head = b"GGUF" + struct.pack("<IQQ", draw(st.sampled_from([2, 3])), *counts)
    return head + b"".join(entries) + b"".join(tensors) + bytes(draw(st.integers(0, 600)))


# Spoiled headers of real models


class Victim:
    """A model's bytes up to its data, and where its fields begin."""

    def __init__(self, path: Path) -> None:
        whole = path.read_bytes()
        self.fields = [span.start for span in spans(path) if span.kind != "data"]
        self.whole = whole[: read_header(path).data_offset]
        self.hidden = len(whole) - len(self.whole)

    def mutants(self, seed: int, count: int) -> Iterator[bytes]:
        draw = random.Random(seed)
        for _ in range(count):
            data = bytearray(self.whole)
            for _ in range(draw.randint(1, 3)):
                # Aimed at fields: most bytes are vocabulary.
                place = draw.choice(self.fields) + draw.randint(0, 11)
                number = draw.choice(EDGES) if draw.random() < 0.7 else draw.getrandbits(64)
                value = struct.pack("<Q", number)[: draw.choice((1, 4, 8))]
                data[place : place + len(value)] = value
            if draw.random() < 0.3:
                place = draw.choice(self.fields)
                shift = draw.randint(-8, 8)
                data[place:place] = data[place : place + max(shift, 0)]
                del data[place : place - min(shift, 0)]
            if draw.random() < 0.2:
                del data[draw.randrange(len(data)) :]
            yield bytes(data)


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[Victim]:
    folder = tmp_path_factory.mktemp("gguf")
    paths = [
        write_tiny_llama(folder / "bytes.gguf", vocab="bytes"),
        write_architecture(folder / "jamba.gguf", "jamba"),
        write_architecture(folder / "gemma2.gguf", "gemma2"),
    ]
    if DEMO.exists():
        paths.append(DEMO)
    return [Victim(path) for path in paths]


@settings(max_examples=FEW, derandomize=True, deadline=None, database=None)
@given(RANDOM)
def test_random_bytes_raise_nothing_but_gguf_error(data: bytes) -> None:
    assert_contained(data)


@settings(max_examples=FEW, derandomize=True, deadline=None, database=None)
@given(headers())
def test_headers_with_any_values_raise_nothing_but_gguf_error(data: bytes) -> None:
    assert_contained(data)


def test_spoiled_headers_raise_nothing_but_gguf_error(victims: list[Victim]) -> None:
    for seed, victim in enumerate(victims):
        for data in victim.mutants(seed, FEW // len(victims)):
            assert_contained(data, victim.hidden)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=MANY, derandomize=True, deadline=None, database=None)
@given(RANDOM)
def test_many_random_bytes_raise_nothing_but_gguf_error(data: bytes) -> None:
    assert_contained(data)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=MANY, derandomize=True, deadline=None, database=None)
@given(headers())
def test_many_headers_with_any_values_raise_nothing_but_gguf_error(data: bytes) -> None:
    assert_contained(data)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_spoiled_headers_raise_nothing_but_gguf_error(victims: list[Victim]) -> None:
    for seed, victim in enumerate(victims, start=100):
        for data in victim.mutants(seed, MANY // len(victims)):
            assert_contained(data, victim.hidden)


def test_headers_and_mutants_are_not_all_refused(victims: list[Victim]) -> None:
    """Or the cases would try the first check only."""
    taken = 0
    for victim in victims:
        for data in victim.mutants(7, 40):
            try:
                read_header_from(BytesSource(data, victim.hidden))
                taken += 1
            except GgufError:
                pass
    assert taken > 5
