"""The GGUF header reader: valid files, files cut at every kind of place, corrupt files, and hostile ones."""

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

import bear_grpc
from bear_grpc.models.gguf import (
    LARGEST_READ_BYTES,
    MAX_ARRAY_STRINGS,
    MAX_ENTRIES,
    MAX_READ_BYTES,
    MAX_TENSORS,
    MAX_TEXT_BYTES,
    ArraySummary,
    GgufError,
    GgufHeader,
    read_header,
)
from bear_grpc.models.gguf_types import FILE_TYPES, TENSOR_TYPES, TypeShare
from tests.helpers.gguf_headers import properties_of
from tests.helpers.ggufs import CORRUPTIONS, WORDS, corrupt, cut_places, spans, write_tiny_llama

PACKAGE = Path(bear_grpc.__file__).parent
DEMO = PACKAGE / "demo" / "bear-demo.gguf"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
MEMORY_LIMIT = 50_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file that no test changes."""
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", chat_template=TEMPLATE)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny, tmp_path / "copy.gguf"))


def problem_of(path: Path) -> GgufError:
    with pytest.raises(GgufError) as caught:
        read_header(path)
    return caught.value


def peak_of(path: Path) -> tuple[GgufHeader | GgufError, int]:
    """What reading gives, and the most bytes of Python memory it took."""
    tracemalloc.start()
    try:
        return read_header(path), tracemalloc.get_traced_memory()[1]
    except GgufError as exc:
        return exc, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def entry(key: str, value_type: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", value_type) + value


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def array(element_type: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", element_type, count) + data


def file_of(path: Path, entries: Sequence[bytes], tensors: Sequence[bytes] = (), size: int = 0) -> Path:
    """A little-endian file of version 3; if it is shorter than `size`, zeros (of a sparse file) follow."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    path.write_bytes(head + b"".join(entries) + b"".join(tensors))
    os.truncate(path, max(size, path.stat().st_size))
    return path


# Valid files


def test_header_of_tiny_model_describes_it(tiny: Path) -> None:
    header = read_header(tiny)
    assert header.version == 3
    assert header.alignment == 32
    assert header.file_bytes == tiny.stat().st_size
    assert header.data_offset % 32 == 0
    assert properties_of(header) == {
        "architecture": "llama",
        "name": "tiny",
        "license": "apache-2.0",
        "kind": "model",
        "split_count": 1,
        "context_length": 256,
        "tokenizer_model": "llama",
        "chat_template": TEMPLATE,
        "has_chat_template": True,
        "parameter_count": sum(int(np.prod(tensor.shape)) for tensor in gguf.GGUFReader(tiny).tensors),
        "quantization": "F32",
        "quantization_mix": (TypeShare("F32", 12, header.parameter_count, 4 * header.parameter_count),),
        "block_count": 1,
        "embedding_length": 32,
        "head_counts": (2,),
        "kv_head_counts": (2,),
        "key_length": 16,
        "value_length": 16,
        "sliding_window": None,
        "expert_count": None,
        "expert_used_count": None,
        "vocabulary_size": header.tensors[0].shape[1],
        "split_number": None,
    }


def test_header_of_demo_model_describes_it() -> None:
    if not DEMO.exists():
        pytest.skip("the demo model is not built")
    header = read_header(DEMO)
    assert (header.architecture, header.name, header.quantization) == ("llama", "bear-demo", "Q8_0")
    assert header.has_chat_template
    assert header.context_length
    assert header.parameter_count > 1_000_000


@pytest.mark.parametrize("model", ["tiny", "Q8_0", "grouped", "demo"])
def test_header_of_valid_file_agrees_with_gguf_package(model: str, tiny: Path, tmp_path: Path) -> None:
    if model == "demo" and not DEMO.exists():
        pytest.skip("the demo model is not built")
    path = {"tiny": tiny, "demo": DEMO}.get(model) or tmp_path / "model.gguf"
    if model == "Q8_0":
        write_tiny_llama(path, dtype="Q8_0", vocab="bytes")
    if model == "grouped":
        write_tiny_llama(path, n_embd=64, n_layer=3, n_head=4, n_head_kv=2, n_ff=96)
    assert_agrees(path)


def test_header_with_every_value_type_agrees_with_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "values.gguf", "llama")
    for name, bits in (("int8", 8), ("int16", 16), ("int32", 32), ("int64", 64)):
        getattr(writer, f"add_{name}")(f"low.{name}", -(2 ** (bits - 1)))
        getattr(writer, f"add_u{name}")(f"high.u{name}", 2**bits - 1)
    writer.add_float32("float32", -1.5e38)
    writer.add_float64("float64", float("inf"))
    writer.add_bool("bool", True)
    writer.add_string("string", "")
    writer.add_string("letters", "é𝄞\n")
    for count in (1, 16, 17, 1024, 1025):
        writer.add_array(f"integers.{count}", list(range(count)))
        writer.add_array(f"floats.{count}", [index / 2 for index in range(count)])
        writer.add_array(f"flags.{count}", [index % 2 == 0 for index in range(count)])
        writer.add_array(f"strings.{count}", ["x" * index for index in range(count)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_agrees(tmp_path / "values.gguf")


def assert_agrees(path: Path) -> None:
    header, reader = read_header(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, value in header.metadata.items():
        expected = fields[key].contents()
        if isinstance(value, ArraySummary):
            assert value.count == len(expected) > 16, key
            assert value.count > 1024 or value.element_type in ("string", "f32", "f64"), key
        else:
            assert value == (tuple(expected) if isinstance(expected, list) else expected), key
    assert [
        (tensor.name, tensor.type, tensor.shape, tensor.element_count, tensor.byte_count)
        for tensor in header.tensors
    ] == [
        (tensor.name, tensor.tensor_type.name, tuple(tensor.shape), tensor.n_elements, tensor.n_bytes)
        for tensor in reader.tensors
    ]
    assert [header.data_offset + tensor.offset for tensor in header.tensors] == [
        tensor.data_offset for tensor in reader.tensors
    ]


def test_version_2_file_is_read(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", 2))
    assert read_header(copy).version == 2


def test_custom_alignment_is_honoured(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
    writer.add_custom_alignment(128)
    writer.add_tensor("a", np.ones(1, np.float32))
    writer.add_tensor("b", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "aligned.gguf")
    assert (header.alignment, header.data_offset % 128, header.tensors[1].offset) == (128, 0, 128)


def test_file_without_tensors_is_read(tmp_path: Path) -> None:
    header = read_header(file_of(tmp_path / "vocabulary.gguf", [entry("general.name", 8, text(b"words"))]))
    assert (header.name, header.tensors, header.parameter_count) == ("words", (), 0)
    assert header.quantization is None
    assert header.context_length is None


def test_tensor_without_dimensions_is_one_element(tmp_path: Path) -> None:
    tensor = text(b"scale") + struct.pack("<IIQ", 0, 0, 0)
    header = read_header(file_of(tmp_path / "scalar.gguf", [], [tensor], size=128))
    assert (header.tensors[0].shape, header.parameter_count) == ((), 1)


def test_bytes_after_the_data_are_ignored(copy: Path, tiny: Path) -> None:
    with copy.open("ab") as file:
        file.write(b"more")
    assert read_header(copy).tensors == read_header(tiny).tensors


def test_symbolic_link_is_followed(tiny: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny)
    assert read_header(link) == read_header(tiny)


# Properties


def test_properties_of_wrong_types_are_none(tmp_path: Path) -> None:
    number, flag = struct.pack("<d", 1.5), b"\x01"
    keys = ("general.architecture", "general.name", "general.license", "tokenizer.ggml.model")
    entries = [entry(key, 12, number) for key in keys]
    entries += [entry("general.file_type", 7, flag), entry("None.context_length", 11, struct.pack("<q", -1))]
    header = read_header(file_of(tmp_path / "types.gguf", entries))
    assert {
        name
        for name, value in properties_of(header).items()
        if value not in (None, ()) and name not in ("split_count", "parameter_count", "has_chat_template")
    } == set()


def test_quantization_without_file_type_is_the_largest_tensor_type(tmp_path: Path) -> None:
    small = text(b"norm") + struct.pack("<IQIQ", 1, 32, 0, 0)
    large = text(b"weights") + struct.pack("<IQQIQ", 2, 32, 8, 8, 128)
    assert read_header(file_of(tmp_path / "mixed.gguf", [], [small, large], size=1024)).quantization == "Q8_0"


def test_quantization_of_unknown_file_type_is_the_largest_tensor_type(tmp_path: Path) -> None:
    tensor = text(b"weights") + struct.pack("<IQQIQ", 2, 256, 8, 14, 0)
    file_type = entry("general.file_type", 4, struct.pack("<I", 999))
    assert (
        read_header(file_of(tmp_path / "new.gguf", [file_type], [tensor], size=4096)).quantization == "Q6_K"
    )


def test_text_beyond_the_limit_is_summarised(tmp_path: Path) -> None:
    template = b"x" * (MAX_TEXT_BYTES + 1)
    entries = [entry("tokenizer.chat_template", 8, text(template)), entry("general.name", 8, text(b"n"))]
    header = read_header(file_of(tmp_path / "long.gguf", entries))
    assert header.metadata["tokenizer.chat_template"] == ArraySummary("byte", len(template))
    assert header.has_chat_template
    assert header.chat_template is None
    assert header.name == "n"


def test_value_that_is_not_utf8_is_shown_with_replacements(tmp_path: Path) -> None:
    path = file_of(tmp_path / "latin1.gguf", [entry("general.name", 8, text(b"caf\xe9"))])
    assert read_header(path).name == "caf\ufffd"


# Tables


def test_tensor_types_agree_with_gguf_package() -> None:
    known = {
        int(kind): (kind.name, *size)
        for kind, size in gguf.GGML_QUANT_SIZES.items()
        if kind != gguf.GGMLQuantizationType.Q8_1  # 40 bytes there; 36 in ggml, which has two halfs per block
    }
    assert known.items() <= TENSOR_TYPES.items()


def test_tensor_types_are_those_of_llama_cpp() -> None:
    """Every id below GGML_TYPE_COUNT: a llama.cpp that adds a type fails here, not at a user's model."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ggml = pytest.importorskip("llama_cpp._ggml").libggml
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    known = {
        kind: (
            ggml.ggml_type_name(kind).decode().upper(),
            ggml.ggml_blck_size(kind),
            ggml.ggml_type_size(kind),
        )
        for kind in range(llama_cpp.GGML_TYPE_COUNT)
        if ggml.ggml_blck_size(kind)
    }
    assert known == TENSOR_TYPES


def test_file_types_are_those_of_llama_cpp() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    prefix = "LLAMA_FTYPE_"
    names = {
        getattr(llama_cpp, name): name.removeprefix(prefix).removeprefix("ALL_").removeprefix("MOSTLY_")
        for name in dir(llama_cpp)
        if name.startswith(prefix) and name != "LLAMA_FTYPE_GUESSED"
    }
    # llama-cpp-python writes one name its own way; llama.h and the gguf package say Q2_K_S.
    assert names | {21: "Q2_K_S"} == FILE_TYPES


# Files cut short

CUT_LABELS = [
    *(
        f"inside {kind}"
        for kind in (
            "magic", "version", "tensor count", "metadata count", "key length", "key", "value type", "value",
            "string length", "string", "element type", "array length", "array of strings", "array of numbers",
            "name length", "name", "dimension count", "dimensions", "tensor type", "data offset", "padding",
            "data",
        )
    ),
    "after magic", "after metadata count", "after metadata", "after the first tensor's name",
    "after the tensor table", "before data", "after the first tensor's data", "before the last byte",
]  # fmt: skip


def test_cut_places_name_every_kind_of_place(tiny: Path) -> None:
    assert sorted(label for label, _ in cut_places(tiny)) == sorted(CUT_LABELS)


@pytest.mark.parametrize("label", CUT_LABELS)
def test_file_cut_short_is_refused_with_the_place(label: str, copy: Path) -> None:
    place = dict(cut_places(copy))[label]
    os.truncate(copy, place)
    error = problem_of(copy)
    assert 0 <= error.offset <= place
    assert any(phrase in error.problem for phrase in ("ends inside", "cut short", "the rest of the file"))


def test_file_cut_in_the_data_names_tensor_and_byte(copy: Path) -> None:
    data = [span for span in spans(copy) if span.kind == "data"]
    os.truncate(copy, data[3].end - 5)
    error = problem_of(copy)
    missing = data[-1].end - data[3].end + 5
    assert error.offset == data[3].end - 5
    assert repr(data[3].owner) in error.problem
    assert f"by {missing:,} bytes" in error.problem


def test_file_cut_anywhere_in_the_header_is_refused(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", vocab="bytes")
    for length in range(read_header(path).data_offset, 0, -1):
        os.truncate(path, length)
        assert 0 <= problem_of(path).offset <= length


# Corrupt files

PROBLEMS = {
    "wrong magic": "not a GGUF file: it begins with b'GGML'",
    "version 1": "GGUF version 1 is no longer supported",
    "version 99": "unknown GGUF version 99",
    "big-endian": "big-endian",
    "huge metadata count": "the number of metadata entries is 9,223,372,036,854,775,808",
    "huge tensor count": "the number of tensors is 1,099,511,627,776",
    "metadata count one too many": "the name of tensor 0 has",
    "huge key length": "metadata key 0 has 18,446,744,073,709,551,615 bytes",
    "empty key": "has 0 bytes",
    "key not UTF-8": "metadata key 0 is not UTF-8",
    "duplicate key": "'general.architecture', occurs twice",
    "huge string length": "the value of 'general.architecture' has 4,611,686,018,427,387,904 bytes",
    "unknown value type": "'test.value' has the unknown value type 99",
    "unknown element type": "'test.value' has the unknown element type 99",
    "nested array": "'test.value' has the nested element type 9",
    "huge array of numbers": "'test.value' has 4,611,686,018,427,387,904 entries",
    "huge array of strings": "'test.value' has 2,305,843,009,213,693,952 entries",
    "huge string in a long array": "'test.value' has a string of 9,223,372,036,854,775,808 bytes",
    "alignment of 48": "general.alignment is no power of two",
    "alignment of 0": "general.alignment is no power of two",
    "alignment is text": "general.alignment is no power of two",
    "huge name length": "the name of tensor 0 has 64 bytes",
    "duplicate tensor": "occurs twice",
    "too many dimensions": "the number of dimensions of tensor 'token_embd.weight' is 5",
    "zero dimension": "impossible shape (0, ",
    "dimension overflow": "impossible shape (1099511627776, 1099511627776)",
    "huge tensor": "out of place: not 4,398,046,511,104",
    "unknown tensor type": "unknown type 99",
    "removed tensor type": "unknown type 4",
    "ragged rows": "type Q4_K has rows of 32, no multiple of 256",
    "offset outside": "offset 1,099,511,627,776, outside the file",
    "offset misaligned": "offset 1, no multiple of 32",
    "offset overlapping": "offset 0, out of place",
}


def test_corruptions_are_all_checked() -> None:
    assert {*PROBLEMS, "unknown architecture"} == set(CORRUPTIONS)


@pytest.mark.parametrize("what", PROBLEMS)
def test_corrupt_file_is_refused_with_its_problem(what: str, copy: Path) -> None:
    corrupt(copy, what)
    error = problem_of(copy)
    assert PROBLEMS[what] in error.problem
    assert 0 <= error.offset < copy.stat().st_size
    assert str(error) == f"{error.problem} (byte {error.offset:,})"


def test_error_of_corrupt_field_points_at_the_field(copy: Path) -> None:
    field = next(span for span in spans(copy) if span.kind == "tensor type")
    corrupt(copy, "unknown tensor type")
    assert problem_of(copy).offset == field.start


def test_unknown_architecture_is_read(copy: Path) -> None:
    """Which architectures can be loaded is the engine's knowledge, not the reader's."""
    corrupt(copy, "unknown architecture")
    header = read_header(copy)
    assert header.architecture == "xxxxx"
    assert header.context_length is None


# What is not a file of some length


def test_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    assert (problem_of(path).problem, problem_of(path).offset) == ("the file is empty", 0)


@pytest.mark.parametrize("kind", ["directory", "FIFO", "device", "socket"])
def test_what_is_no_regular_file_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket is at most 107 bytes
    path = Path("thing")
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    assert problem_of(path).problem == "not a regular file"


def test_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "missing.gguf")


def test_unreadable_file_raises_permission_error(copy: Path) -> None:
    """In a child process, which gives up root: permissions do not bind root."""
    copy.chmod(0)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from bear_grpc.models.gguf import read_header\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    read_header(Path(sys.argv[1]))\n"
        "except PermissionError as exc:\n"
        "    print(type(exc).__name__)\n"
    )
    command = [sys.executable, "-c", script, str(copy)]
    child = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert (child.stdout, child.stderr) == ("PermissionError\n", "")


def test_open_files_after_reading_are_those_before(copy: Path, tmp_path: Path) -> None:
    before = os.dup(0)
    os.close(before)
    read_header(copy)
    corrupt(copy, "wrong magic")
    problem_of(copy)
    problem_of(tmp_path)
    after = os.dup(0)
    os.close(after)
    assert after == before


# Hostile files


def test_header_at_every_limit_stays_small(tmp_path: Path) -> None:
    """The most that is kept of a file: all tensors, all entries, all text, with letters of four bytes."""
    wide = "𝄞"
    keys = [f"{index:04}{wide * 63}" for index in range(MAX_ENTRIES)]
    entries = [entry(key, 9, array(12, 16, b"\x01" * 128)) for key in keys[1:]]
    entries.append(entry(keys[0], 8, text(b"a" * (MAX_TEXT_BYTES - 4) + wide.encode())))
    tensors = [
        text(f"{index:05}{wide * 14}".encode()) + struct.pack("<I4QIQ", 4, 1, 1, 1, 1, 0, 32 * index)
        for index in range(MAX_TENSORS)
    ]
    path = file_of(tmp_path / "limits.gguf", entries, tensors)
    os.truncate(path, path.stat().st_size + 33 * MAX_TENSORS)
    header, peak = peak_of(path)
    assert isinstance(header, GgufHeader)
    assert len(header.tensors) == MAX_TENSORS
    assert len(header.metadata) == MAX_ENTRIES
    assert peak < MEMORY_LIMIT


def test_array_with_as_many_strings_as_allowed_is_read(tmp_path: Path) -> None:
    count = MAX_ARRAY_STRINGS
    path = file_of(tmp_path / "strings.gguf", [entry("a", 9, array(8, count))], size=8 * count + 100)
    assert read_header(path).metadata == {"a": ArraySummary("string", count)}


def test_array_with_too_many_strings_is_refused(tmp_path: Path) -> None:
    count = MAX_ARRAY_STRINGS + 1
    path = file_of(tmp_path / "strings.gguf", [entry("a", 9, array(8, count))], size=8 * count + 100)
    error, peak = peak_of(path)
    assert "2,000,000 strings" in str(error)
    assert peak < 1_000_000


def test_header_that_needs_too_much_reading_is_refused(tmp_path: Path) -> None:
    """Strings just longer than a read: each step of 8 bytes costs a read of a window."""
    length = 300_000
    path = tmp_path / "far.gguf"
    file_of(path, [entry("a", 9, array(8, 1_000))], size=1_000 * (length + 8) + 100)
    start = 24 + len(entry("a", 9, array(8, 1_000)))
    with path.open("r+b") as file:
        for index in range(1_000):
            file.seek(start + index * (length + 8))
            file.write(struct.pack("<Q", length))
    error, peak = peak_of(path)
    assert f"more than {MAX_READ_BYTES:,} bytes" in str(error)
    assert peak < 3 * LARGEST_READ_BYTES


# The helper itself


def test_tiny_llama_with_equal_arguments_is_equal(tiny: Path, tmp_path: Path) -> None:
    again = write_tiny_llama(tmp_path / "again.gguf", chat_template=TEMPLATE)
    other = write_tiny_llama(tmp_path / "other.gguf", chat_template=TEMPLATE, seed=1)
    assert again.read_bytes() == tiny.read_bytes() != other.read_bytes()


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_tiny_llama_in_llama_cpp_loads_and_generates(dtype: str, tmp_path: Path) -> None:
    """In a child process: an abort in llama.cpp is then a failed test, not the end of the run."""
    pytest.importorskip("llama_cpp")
    path = write_tiny_llama(tmp_path / "tiny.gguf", dtype="Q8_0" if dtype == "Q8_0" else "F32")
    script = (
        "import sys\n"
        "from llama_cpp import Llama\n"
        "llama = Llama(sys.argv[1], n_ctx=64, n_threads=1, n_gpu_layers=0, verbose=False)\n"
        "tokens = llama.tokenize(sys.argv[2].encode())\n"
        "stream = llama.generate(tokens, temp=0.0)\n"
        "generated = [next(stream) for _ in range(8)]\n"
        "print(len(tokens), llama.detokenize(tokens).decode(), max(generated) < llama.n_vocab())\n"
        "llama.close()\n"
    )
    prompt = " ".join(WORDS)
    command = [sys.executable, "-c", script, str(path), prompt]
    child = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert child.stdout == f"{len(WORDS) + 1} {prompt} True\n", child.stderr
