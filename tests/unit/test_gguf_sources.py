"""Headers that are not in one file of this machine: read in ranges, and of models in several parts."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

import bear_grpc
from bear_grpc.errors import ModelFileInvalid, ModelFileNotFound
from bear_grpc.models.entry import header_of
from bear_grpc.models.gguf import (
    FIRST_READ_BYTES,
    LARGEST_READ_BYTES,
    ArraySummary,
    GgufError,
    read_header,
    read_header_from,
)
from bear_grpc.models.gguf_parts import join_parts, parts_of, read_headers
from bear_grpc.models.gguf_types import GgufHeader, TypeShare
from tests.helpers.gguf_headers import BytesSource, properties_of
from tests.helpers.ggufs import write_tiny_llama

DEMO = Path(bear_grpc.__file__).parent / "demo" / "bear-demo.gguf"


def write(path: Path, **numbers: object) -> Path:
    """A file without tensors whose metadata are these numbers and lists of a llama."""
    writer = GGUFWriter(path, "llama")
    for name, value in numbers.items():
        key = f"llama.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint64(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# ---- ranges -----------------------------------------------------------------------------------------


def test_header_of_ranges_is_that_of_the_file(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    assert read_header_from(BytesSource(path.read_bytes())) == read_header(path)


def test_demo_model_elsewhere_is_known_after_one_read():
    if not DEMO.exists():
        pytest.skip("the demo model is not built")
    source = BytesSource(DEMO.read_bytes())
    assert read_header_from(source) == read_header(DEMO)
    assert source.reads == [(0, FIRST_READ_BYTES)]


def test_long_header_takes_few_reads_that_grow(tmp_path: Path):
    """As many words as a large vocabulary has: 5 MB of them."""
    path = tmp_path / "words.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list([f"word-of-some-length-{index:06}" for index in range(150_000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    source = BytesSource(path.read_bytes())
    assert source.size > 5_000_000
    assert read_header_from(source).vocabulary_size == 150_000
    counts = [count for _, count in source.reads]
    assert counts[:3] == [FIRST_READ_BYTES, 2 * FIRST_READ_BYTES, LARGEST_READ_BYTES]
    assert len(counts) <= 7
    assert max(counts) == LARGEST_READ_BYTES


def test_numbers_that_are_not_kept_are_not_read():
    count = 2_000_000
    key = b"tokenizer.ggml.scores"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 2, len(key)) + key + struct.pack("<IIQ", 9, 6, count)
    tail = struct.pack("<Q", 12) + b"general.name" + struct.pack("<IQ", 8, 1) + b"n"
    source = BytesSource(head + bytes(4 * count) + tail)
    header = read_header_from(source)
    assert (header.name, header.metadata[key.decode()]) == ("n", ArraySummary("f32", count))
    assert len(source.reads) == 2


def test_file_elsewhere_that_is_too_short_is_refused(tmp_path: Path):
    data = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    with pytest.raises(GgufError, match="cut short"):
        read_header_from(BytesSource(data[:-1]))


def test_source_that_gives_less_than_it_announced_is_refused(tmp_path: Path):
    source = BytesSource(write_tiny_llama(tmp_path / "tiny.gguf").read_bytes())
    source.data = source.data[:100]
    source.read = lambda offset, count: source.data[offset : offset + count]  # type: ignore[method-assign]
    with pytest.raises(GgufError, match="became shorter"):
        read_header_from(source)


def test_error_of_the_source_goes_to_the_caller():
    class Broken:
        size = 1000

        def read(self, offset: int, count: int) -> bytes:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        read_header_from(Broken())


# ---- questions --------------------------------------------------------------------------------------


def test_numbers_of_layers_are_kept_up_to_a_bound(tmp_path: Path):
    most, more = list(range(1024)), list(range(1025))
    header = read_header(write(tmp_path / "lists.gguf", most=most, more=more))
    assert header.metadata["llama.most"] == tuple(most)
    assert header.metadata["llama.more"] == ArraySummary("i32", 1025)


def test_many_lists_of_numbers_are_kept_up_to_a_bound_together(tmp_path: Path):
    lists = {f"list{index}": [1] * 1024 for index in range(70)}
    header = read_header(write(tmp_path / "lists.gguf", **lists))
    assert sum(isinstance(value, tuple) for value in header.metadata.values()) == 64


def test_per_layer_number_may_be_one_for_all_or_a_list(tmp_path: Path):
    heads = {"attention__head_count": 8, "attention__head_count_kv": [0, 2, 4]}
    header = read_header(write(tmp_path / "heads.gguf", block_count=3, embedding_length=64, **heads))
    assert (header.head_counts, header.kv_head_counts) == ((8, 8, 8), (0, 2, 4))
    assert (header.key_length, header.value_length) == (8, 8)


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, -3], [True, True, True]])
def test_list_that_is_not_of_every_layer_is_none(tmp_path: Path, counts: list[int]):
    header = read_header(write(tmp_path / "heads.gguf", block_count=3, attention__head_count_kv=counts))
    assert header.per_layer("attention.head_count_kv") is None


def test_absurd_number_of_layers_is_no_list(tmp_path: Path):
    header = read_header(write(tmp_path / "deep.gguf", block_count=2**31 - 1, attention__head_count=4))
    assert header.head_counts is None


def test_quantization_mix_has_most_bytes_first(tmp_path: Path):
    header = read_header(write_tiny_llama(tmp_path / "tiny.gguf", dtype="Q8_0"))
    q8, f32 = header.quantization_mix
    assert (q8.type, f32) == ("Q8_0", TypeShare("F32", 3, 96, 384))
    assert (q8.tensor_count, q8.byte_count) == (9, q8.element_count * 34 // 32)
    assert q8.element_count + f32.element_count == header.parameter_count


# ---- parts ------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model of two parts, as gguf-split makes them: all metadata are in the first."""
    base = tmp_path / "model.gguf"
    writer = GGUFWriter(base, "llama", split_max_tensors=2)
    writer.add_name("split")
    for name in ("a", "b", "c", "d"):
        writer.add_tensor(name, np.zeros((2, 32), np.float32))
    writer.write_header_to_file(base)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("model-*.gguf"))


def test_split_model_is_its_first_part_with_all_tensors(parts: list[Path]):
    header = read_headers(parts)
    assert header.name == "split"
    assert [tensor.name for tensor in header.tensors] == ["a", "b", "c", "d"]
    assert header.file_bytes == sum(path.stat().st_size for path in parts)
    assert properties_of(header)["parameter_count"] == 256


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ((0,), "1 files, but"),
        ((0, 0), "is part 1 of 2"),
        ((1, 0), "is part 2 of 2"),
    ],
)
def test_files_that_are_not_all_parts_in_order_are_refused(
    parts: list[Path], order: tuple[int, ...], problem: str
):
    with pytest.raises(GgufError, match=problem):
        read_headers([parts[index] for index in order])


def test_parts_with_the_same_tensor_are_refused(parts: list[Path]):
    first, second = (read_header(path) for path in parts)
    twin = GgufHeader(3, second.metadata, first.tensors, 0, 32, 1)
    with pytest.raises(GgufError, match="in two parts"):
        join_parts([first, twin])


def test_parts_without_all_tensors_are_refused(parts: list[Path]):
    first, second = (read_header(path) for path in parts)
    less = GgufHeader(3, second.metadata, second.tensors[:1], 0, 32, 1)
    with pytest.raises(GgufError, match="3 tensors in all parts, not 4"):
        join_parts([first, less])


def test_model_of_one_file_is_its_header(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    assert read_headers([path]) == read_header(path)


def test_split_model_is_found_by_its_first_part(parts: list[Path]):
    assert parts_of(parts[0], len(parts)) == parts
    assert header_of(parts[0]) == read_headers(parts)


def test_split_model_with_a_part_missing_or_another_name_is_refused(parts: list[Path], tmp_path: Path):
    folder = tmp_path / "alone"
    folder.mkdir()
    alone = folder / parts[0].name
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelFileNotFound):
        header_of(alone)
    renamed = alone.rename(folder / "model.gguf")
    with pytest.raises(ModelFileInvalid, match="its name"):
        header_of(renamed)
