"""What a GGUF header holds: its values, the tensor types of ggml, and the questions asked of it.

Reading and checking a file is in `gguf.py`.
"""

from dataclasses import dataclass
from struct import Struct
from typing import TypeAlias, TypeGuard

Scalar: TypeAlias = bool | int | float | str

MAX_LAYERS = 1_024  # above LLAMA_MAX_LAYERS of llama.cpp

# id: (name, encoding), enum gguf_type in gguf.h.
SCALAR_TYPES = {
    0: ("u8", Struct("<B")), 1: ("i8", Struct("<b")), 2: ("u16", Struct("<H")), 3: ("i16", Struct("<h")),
    4: ("u32", Struct("<I")), 5: ("i32", Struct("<i")), 6: ("f32", Struct("<f")), 7: ("bool", Struct("<?")),
    10: ("u64", Struct("<Q")), 11: ("i64", Struct("<q")), 12: ("f64", Struct("<d")),
}  # fmt: skip

# id: (name, elements of a block, bytes of a block), as ggml_type_name, ggml_blck_size and ggml_type_size of
# llama.cpp 0.5.0-dev (llama-cpp-python 0.3.36) give them. The ids left out were removed from ggml.
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip

# general.file_type: enum llama_ftype in llama.h.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """Stands for an array too long to keep, or for text too long to keep (element type "byte").

    More than 16 entries are too long, of whole numbers and flags more than 1,024: those have one per layer.
    """

    element_type: str
    count: int


MetadataValue: TypeAlias = Scalar | tuple[Scalar, ...] | ArraySummary


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is. `shape` begins with the contiguous dimension, `offset` counts from the data."""

    name: str
    type: str
    shape: tuple[int, ...]
    element_count: int
    offset: int
    byte_count: int


@dataclass(frozen=True, slots=True)
class TypeShare:
    """What the tensors of one type are of a model."""

    type: str
    tensor_count: int
    element_count: int
    byte_count: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says about itself. A property is None where it says nothing or has a wrong type.

    Of a split model: what its first part says, the tensors of all parts, and their size together.
    """

    version: int
    metadata: dict[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    alignment: int
    file_bytes: int

    @property
    def architecture(self) -> str | None:
        return self._text("general.architecture")

    @property
    def name(self) -> str | None:
        return self._text("general.name")

    @property
    def license(self) -> str | None:
        return self._text("general.license")

    @property
    def kind(self) -> str | None:
        """What the file holds: "model", "adapter", "mmproj", "imatrix"; old files do not say."""
        return self._text("general.type")

    @property
    def split_count(self) -> int:
        """Over how many files the model is spread; 1 if this one is all of it."""
        return self._count("split.count") or 1

    @property
    def split_number(self) -> int | None:
        """Which of these files this is, from 0 on."""
        return self._count("split.no")

    @property
    def context_length(self) -> int | None:
        return self.number("context_length")

    @property
    def block_count(self) -> int | None:
        return self.number("block_count")

    @property
    def embedding_length(self) -> int | None:
        return self.number("embedding_length")

    @property
    def head_counts(self) -> tuple[int, ...] | None:
        """Query heads of each layer."""
        return self.per_layer("attention.head_count")

    @property
    def kv_head_counts(self) -> tuple[int, ...] | None:
        """Heads of each layer in the KV cache; those of the queries where the file does not say."""
        return self.per_layer("attention.head_count_kv") or self.head_counts

    @property
    def key_length(self) -> int | None:
        """Values of one head's key; an equal share of the embedding where the file does not say."""
        return self.number("attention.key_length") or self._embedding_share

    @property
    def value_length(self) -> int | None:
        return self.number("attention.value_length") or self._embedding_share

    @property
    def sliding_window(self) -> int | None:
        return self.number("attention.sliding_window")

    @property
    def expert_count(self) -> int | None:
        return self.number("expert_count")

    @property
    def expert_used_count(self) -> int | None:
        return self.number("expert_used_count")

    @property
    def vocabulary_size(self) -> int | None:
        """Tokens of the tokenizer; the declared number where there is no list of them."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, ArraySummary):
            return min(tokens.count, 2**31 - 1)
        return len(tokens) if isinstance(tokens, tuple) else self.number("vocab_size")

    @property
    def tokenizer_model(self) -> str | None:
        return self._text("tokenizer.ggml.model")

    @property
    def chat_template(self) -> str | None:
        return self._text("tokenizer.chat_template")

    @property
    def has_chat_template(self) -> bool:
        """True also if the template is too long to keep."""
        return bool(self.metadata.get("tokenizer.chat_template"))

    @property
    def parameter_count(self) -> int:
        """Elements of all tensors in this file."""
        return sum(tensor.element_count for tensor in self.tensors)

    @property
    def quantization(self) -> str | None:
        """The declared file type ("Q4_K_M"), else the tensor type that takes the most bytes."""
        declared = self._count("general.file_type")
        if declared in FILE_TYPES:
            return FILE_TYPES[declared]
        return next((share.type for share in self.quantization_mix), None)

    @property
    def quantization_mix(self) -> tuple[TypeShare, ...]:
        """Each tensor type with what is of it, most bytes first."""
        found: dict[str, list[TensorInfo]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.type, []).append(tensor)
        shares = [
            TypeShare(
                name,
                len(tensors),
                sum(tensor.element_count for tensor in tensors),
                sum(tensor.byte_count for tensor in tensors),
            )
            for name, tensors in found.items()
        ]
        return tuple(sorted(shares, key=lambda share: share.byte_count, reverse=True))

    def number(self, name: str) -> int | None:
        """A number that the architecture defines: "context_length" of a llama is `llama.context_length`."""
        return self._count(f"{self.architecture}.{name}")

    def per_layer(self, name: str) -> tuple[int, ...] | None:
        """A number of each layer, written as a list of them or as one for all; None if the list is short."""
        value, layers = self.metadata.get(f"{self.architecture}.{name}"), self.block_count
        if layers is None or layers > MAX_LAYERS:
            return None
        if isinstance(value, tuple):
            counts = tuple(entry for entry in value[:layers] if _is_count(entry))
            return counts if len(counts) == layers else None
        count = self.number(name)
        return None if count is None else (count,) * layers

    @property
    def _embedding_share(self) -> int | None:
        heads, width = self.head_counts, self.embedding_length
        return width // heads[0] if heads and heads[0] and width is not None else None

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def _count(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if _is_count(value) else None


def _is_count(value: object) -> TypeGuard[int]:
    """A whole number from 0 to 2**31 - 1: what fits each integer type it may be given to."""
    return type(value) is int and 0 <= value < 2**31
