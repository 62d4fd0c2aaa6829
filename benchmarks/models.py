"""The models that are measured: real shapes, random weights, made on this machine and kept in the cache.

Speed does not depend on what the weights say, so nothing has to be downloaded. `python -m benchmarks.models`
makes them without measuring.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from benchmarks.cache import SetupError, folder, only_one
from tools.progress import status

# Raise it with any change of what is written: files of an older revision are not used any more.
REVISION = 1


@dataclass(frozen=True)
class Shape:
    """A llama model's dimensions."""

    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    context_length: int
    file_type: LlamaFileType

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        wide, n_kv, n_ff = self.n_embd, self.n_embd // self.n_head * self.n_head_kv, self.n_ff
        yield "token_embd.weight", (self.n_vocab, wide)
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (wide,), "attn_q": (wide, wide), "attn_k": (n_kv, wide),
            "attn_v": (n_kv, wide), "attn_output": (wide, wide), "ffn_norm": (wide,),
            "ffn_gate": (n_ff, wide), "ffn_up": (n_ff, wide), "ffn_down": (wide, n_ff),
        }  # fmt: skip
        for index in range(self.n_layer):
            yield from ((f"blk.{index}.{name}.weight", shape) for name, shape in layer.items())
        yield "output_norm.weight", (wide,)
        yield "output.weight", (self.n_vocab, wide)


SHAPES = {
    # TinyLlama-1.1B's: 636 MiB.
    "tinyllama": Shape(2048, 22, 32, 4, 5632, 32_000, 2048, LlamaFileType.MOSTLY_Q4_K_M),
    # A twentieth of it: 58 MiB, for what is about order and not about speed, and for quick runs.
    "small": Shape(512, 8, 8, 4, 1408, 32_000, 2048, LlamaFileType.MOSTLY_Q8_0),
    # Hardly any work in a step but the vocabulary's: shows what a server costs by itself. 4 MiB.
    "micro": Shape(64, 2, 2, 2, 192, 32_000, 2048, LlamaFileType.MOSTLY_Q8_0),
}


def get(name: str) -> Path:
    """The model's file, made if the cache lacks it.

    Raises:
        SetupError: there is no room, or quantizing failed.
    """
    file = folder("models") / f"{name}-{SHAPES[name].file_type.name.removeprefix('MOSTLY_')}-r{REVISION}.gguf"
    if not file.exists():
        with only_one(file):
            if not file.exists():
                _make(name, file)
    return file


def _make(name: str, file: Path) -> None:
    shape = SHAPES[name]
    source, partial = file.with_suffix(".f16.part"), file.with_suffix(".part")
    values = sum(int(np.prod(dimensions)) for _, dimensions in shape.tensors)
    needed = values * 3
    if (free := shutil.disk_usage(file.parent).free) < needed:
        raise SetupError(f"{name} needs {needed >> 20} MiB in {file.parent}, {free >> 20} MiB are free")
    try:
        with status(f"Making the model {name}: {values / 1e6:.0f} million random weights") as line:
            for fraction in _write(shape, name, source):
                line.update(f"{fraction:.0%}")
        with status(f"Quantizing {name} to {shape.file_type.name}"):
            # llama.cpp aborts the process when something is wrong, and keeps its memory: a child.
            command: list[str | Path] = [sys.executable, "-m", "benchmarks.models", "--quantize"]
            command += [source, partial, str(int(shape.file_type))]
            done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise SetupError(f"quantizing failed: {done.stderr.decode(errors='replace')[-500:]}")
        partial.rename(file)
    finally:
        source.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def _write(shape: Shape, name: str, path: Path) -> Iterator[float]:
    """Writes an F16 file, one tensor in memory at a time; tells the part that is done."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(f"{name} shape, random weights")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    _add_vocabulary(writer, shape.n_vocab)
    tensors = list(shape.tensors)
    for tensor, dimensions in tensors:
        dtype = np.dtype(np.float32 if len(dimensions) == 1 else np.float16)
        size = int(np.prod(dimensions)) * dtype.itemsize
        kind = GGMLQuantizationType.F32 if len(dimensions) == 1 else GGMLQuantizationType.F16
        writer.add_tensor_info(tensor, dimensions, dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for index, (_, dimensions) in enumerate(tensors):
        if len(dimensions) == 1:
            data = np.ones(dimensions, np.float32)
        else:
            data = rng.standard_normal(dimensions, np.float32)
            data *= np.float32(dimensions[1] ** -0.5)
            data = data.astype(np.float16)
        writer.write_tensor_data(data)
        yield (index + 1) / len(tensors)
    writer.close()


def _add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """An SPM tokenizer with byte fallback: short made-up words, every beginning of one being a piece too."""
    special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    special += [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    words = ("".join(letters) for length in (1, 2, 3) for letters in product(ascii_lowercase, repeat=length))
    pieces = (piece for word in words for piece in (f"▁{word}", word))
    tokens = [*special, ("▁", TokenType.NORMAL)]
    tokens += [(piece, TokenType.NORMAL) for piece in islice(pieces, size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece, _ in tokens])
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _quantize(source: str, target: str, file_type: int) -> int:
    import llama_cpp.llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = os.cpu_count() or 1
    params.max_buf_size = 256 << 20
    return int(lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


def main() -> int:
    if sys.argv[1:2] == ["--quantize"]:
        return _quantize(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    for name in SHAPES:
        print(get(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
