"""Makes GGUF files for tests: tiny models that llama.cpp loads, files cut short, and corrupt files.

Positions inside a file come from the `gguf` package, not from the reader under test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType

WORDS = ("a", "and", "bear", "fish", "forest", "hello", "honey", "is", "one", "river", "the", "two", "world")

_STRING, _ARRAY = 8, 9


def write_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    vocab: Literal["bytes", "words"] | Sequence[str] = "words",
    n_embd: int = 32,
    n_layer: int = 1,
    n_head: int = 2,
    n_head_kv: int = 2,
    n_ff: int = 64,
    context_length: int = 256,
    chat_template: str | None = None,
    architecture: str = "llama",
    dtype: Literal["F32", "Q8_0"] = "F32",
    name: str = "tiny",
    split_tensors: int = 0,
) -> Path:
    """Writes a llama model with random weights, below 1 MB, which loads and generates nonsense.

    The tokenizer is SPM with byte fallback. `vocab` gives its pieces besides bytes: none, those of `WORDS`,
    or those of other words. Equal arguments give equal bytes. Q8_0 needs `n_embd` and `n_ff` divisible by 32.
    With `split_tensors` there are parts of so many tensors, named after `path`, and no file `path`.
    """
    words = {"bytes": (), "words": WORDS}[vocab] if isinstance(vocab, str) else tuple(vocab)
    pieces = _pieces(words)
    writer = GGUFWriter(path, architecture, split_max_tensors=split_tensors)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_tags(["test", "random"])
    writer.add_file_type(LlamaFileType.ALL_F32 if dtype == "F32" else LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(context_length)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece, _ in pieces])
    writer.add_token_scores([-float(index) for index in range(len(pieces))])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    rng = np.random.default_rng(seed)
    for tensor, shape in _tensors(len(pieces), n_embd, n_layer, n_head, n_head_kv, n_ff):
        if len(shape) == 1:
            writer.add_tensor(tensor, np.ones(shape, np.float32))
            continue
        weights = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        kind = GGMLQuantizationType[dtype]
        writer.add_tensor(tensor, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _pieces(words: Sequence[str]) -> list[tuple[str, TokenType]]:
    special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    byte_tokens = [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    # SPM merges two neighbours at a time: a word is reached only if its beginnings are pieces too. The space
    # is always one, or byte fallback would show it as the three bytes of "▁".
    starts = dict.fromkeys(
        text[:end] for word in words for text in (f"▁{word}", word) for end in range(2, len(text) + 1)
    )
    return special + byte_tokens + [(piece, TokenType.NORMAL) for piece in ("▁", *starts)]


def _tensors(
    n_vocab: int, n_embd: int, n_layer: int, n_head: int, n_head_kv: int, n_ff: int
) -> list[tuple[str, tuple[int, ...]]]:
    n_kv = n_embd // n_head * n_head_kv
    tensors: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (n_vocab, n_embd))]
    for layer in range(n_layer):
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (n_embd,), "attn_q": (n_embd, n_embd), "attn_k": (n_kv, n_embd),
            "attn_v": (n_kv, n_embd), "attn_output": (n_embd, n_embd), "ffn_norm": (n_embd,),
            "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff),
        }  # fmt: skip
        tensors += [(f"blk.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    return [*tensors, ("output_norm.weight", (n_embd,)), ("output.weight", (n_vocab, n_embd))]


@dataclass(frozen=True)
class Span:
    """A field of a file: what it is, the key or tensor it belongs to, and its bytes."""

    kind: str
    owner: str
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def spans(path: Path) -> list[Span]:
    """Every field of a valid file in order, the padding and the tensors' data included."""
    reader = GGUFReader(path)
    found = [
        Span("magic", "", 0, 4),
        Span("version", "", 4, 4),
        Span("tensor count", "", 8, 8),
        Span("metadata count", "", 16, 8),
    ]

    def add(owner: str, start: int, fields: Sequence[tuple[str, int]]) -> None:
        for kind, size in fields:
            found.append(Span(kind, owner, start, size))
            start += size

    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        head = [("key length", 8), ("key", len(field.parts[1])), ("value type", 4)]
        sizes = [part.nbytes for part in field.parts[3:]]
        if field.types[0] == _STRING:
            value = list(zip(("string length", "string"), sizes, strict=True))
        elif field.types[0] == _ARRAY:
            kind = "array of strings" if field.types[1] == _STRING else "array of numbers"
            value = [("element type", 4), ("array length", 8), (kind, sum(sizes[2:]))]
        else:
            value = [("value", sizes[0])]
        add(key, field.offset, head + value)
    kinds = ("name length", "name", "dimension count", "dimensions", "tensor type", "data offset")
    for tensor in reader.tensors:
        sizes = [part.nbytes for part in tensor.field.parts]
        add(tensor.name, tensor.field.offset, list(zip(kinds, sizes, strict=True)))
    add("", found[-1].end, [("padding", reader.data_offset - found[-1].end)])
    found += [Span("data", tensor.name, tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors]
    return found


def cut_places(path: Path) -> list[tuple[str, int]]:
    """One place of each kind at which a valid file can be cut: a label, and how many bytes are then left."""
    fields = [span for span in spans(path) if span.size]
    first: dict[str, Span] = {}
    for span in fields:
        first.setdefault(span.kind, span)
    places = [(f"inside {kind}", span.start + span.size // 2) for kind, span in first.items()]
    table = first["name length"].start
    data = [span for span in fields if span.kind == "data"]
    return [
        *places,
        ("after magic", 4),
        ("after metadata count", 24),
        ("after metadata", table),
        ("after the first tensor's name", first["name"].end),
        ("after the tensor table", max(span.end for span in fields if span.kind == "data offset")),
        ("before data", data[0].start),
        ("after the first tensor's data", data[0].end),
        ("before the last byte", data[-1].end - 1),
    ]


class _Editor:
    """The bytes of a valid file, and changes to them."""

    def __init__(self, path: Path) -> None:
        self.spans = spans(path)
        self.data = bytearray(path.read_bytes())

    def find(self, kind: str, index: int = 0) -> Span:
        return [span for span in self.spans if span.kind == kind][index]

    def put(self, kind: str, value: bytes, index: int = 0) -> None:
        start = self.find(kind, index).start
        self.data[start : start + len(value)] = value

    def add_entry(self, key: bytes, value_type: int, value: bytes) -> None:
        """Appends to the metadata; the rest stays valid."""
        table, padding = self.find("name length").start, self.find("padding")
        entry = _u64(len(key)) + key + _u32(value_type) + value
        head = self.data[:table] + entry + self.data[table : padding.start]
        head += bytes(-len(head) % 32)
        self.data = head + self.data[padding.end :]
        count = self.find("metadata count").start
        (old,) = struct.unpack_from("<Q", self.data, count)
        self.put("metadata count", _u64(old + 1))

    def repeat_tensor_name(self) -> None:
        named: dict[int, Span] = {}
        for span in self.spans:
            if span.kind == "name" and (twin := named.setdefault(span.size, span)) is not span:
                self.data[span.start : span.end] = self.data[twin.start : twin.end]
                return
        raise ValueError("no two tensor names have one length")

    def rename_architecture(self) -> None:
        span = next(s for s in self.spans if s.kind == "string" and s.owner == "general.architecture")
        self.data[span.start : span.end] = b"x" * span.size


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


_CORRUPTIONS: dict[str, Callable[[_Editor], None]] = {
    "wrong magic": lambda file: file.put("magic", b"GGML"),
    "version 1": lambda file: file.put("version", _u32(1)),
    "version 99": lambda file: file.put("version", _u32(99)),
    "big-endian": lambda file: file.put("version", struct.pack(">I", 3)),
    "huge metadata count": lambda file: file.put("metadata count", _u64(2**63)),
    "huge tensor count": lambda file: file.put("tensor count", _u64(2**40)),
    "metadata count one too many": lambda file: file.put(
        "metadata count", _u64(len([s for s in file.spans if s.kind == "key"]) + 1)
    ),
    "huge key length": lambda file: file.put("key length", _u64(2**64 - 1)),
    "empty key": lambda file: file.add_entry(b"", 4, _u32(1)),
    "key not UTF-8": lambda file: file.put("key", b"\xff\xfe"),
    "duplicate key": lambda file: file.add_entry(b"general.architecture", _STRING, _u64(5) + b"llama"),
    "huge string length": lambda file: file.put("string length", _u64(2**62)),
    "unknown value type": lambda file: file.add_entry(b"test.value", 99, _u32(1)),
    "unknown element type": lambda file: file.add_entry(b"test.value", _ARRAY, _u32(99) + _u64(0)),
    "nested array": lambda file: file.add_entry(
        b"test.value", _ARRAY, _u32(_ARRAY) + _u64(1) + _u32(4) + _u64(1) + _u32(1)
    ),
    "huge array of numbers": lambda file: file.add_entry(b"test.value", _ARRAY, _u32(4) + _u64(2**62)),
    "huge array of strings": lambda file: file.add_entry(b"test.value", _ARRAY, _u32(_STRING) + _u64(2**61)),
    "huge string in a long array": lambda file: file.add_entry(
        b"test.value", _ARRAY, _u32(_STRING) + _u64(17) + _u64(0) * 16 + _u64(2**63)
    ),
    "alignment of 48": lambda file: file.add_entry(b"general.alignment", 4, _u32(48)),
    "alignment of 0": lambda file: file.add_entry(b"general.alignment", 4, _u32(0)),
    "alignment is text": lambda file: file.add_entry(b"general.alignment", _STRING, _u64(2) + b"32"),
    "huge name length": lambda file: file.put("name length", _u64(64)),
    "duplicate tensor": lambda file: file.repeat_tensor_name(),
    "too many dimensions": lambda file: file.put("dimension count", _u32(5)),
    "zero dimension": lambda file: file.put("dimensions", _u64(0)),
    "dimension overflow": lambda file: file.put("dimensions", _u64(2**40) * 2),
    "huge tensor": lambda file: file.put("dimensions", _u64(2**20) * 2),
    "unknown tensor type": lambda file: file.put("tensor type", _u32(99)),
    "removed tensor type": lambda file: file.put("tensor type", _u32(4)),
    "ragged rows": lambda file: file.put("tensor type", _u32(GGMLQuantizationType.Q4_K)),
    "offset outside": lambda file: file.put("data offset", _u64(2**40), index=1),
    "offset misaligned": lambda file: file.put("data offset", _u64(1)),
    "offset overlapping": lambda file: file.put("data offset", _u64(0), index=1),
    "unknown architecture": lambda file: file.rename_architecture(),
}

CORRUPTIONS = tuple(_CORRUPTIONS)
"""What `corrupt` can do. "unknown architecture" leaves a header that is valid, but that llama.cpp refuses."""


def corrupt(path: Path, what: str) -> None:
    """Spoils a valid file in place. Its first tensor has two dimensions, as that of the tiny model has."""
    editor = _Editor(path)
    _CORRUPTIONS[what](editor)
    path.write_bytes(editor.data)
