"""What a GGUF header holds: its values, the tensor types of ggml, and the questions asked of it.

Reading and checking a file is in `gguf.py`.
"""

from collections import Counter
from dataclasses import dataclass
from struct import Struct
from typing import TypeAlias

Scalar: TypeAlias = bool | int | float | str

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
    """Stands for an array of more than 16 entries, or for text too long to keep (element type "byte")."""

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
class GgufHeader:
    """What a file says about itself. A property is None where it says nothing or has a wrong type."""

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
    def context_length(self) -> int | None:
        return self._count(f"{self.architecture}.context_length")

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
        sizes = Counter[str]()
        for tensor in self.tensors:
            sizes[tensor.type] += tensor.byte_count
        return max(sizes, key=sizes.__getitem__, default=None)

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def _count(self, key: str) -> int | None:
        """A whole number from 0 to 2**31 - 1: what fits each integer type it may be given to."""
        value = self.metadata.get(key)
        return value if type(value) is int and 0 <= value < 2**31 else None
