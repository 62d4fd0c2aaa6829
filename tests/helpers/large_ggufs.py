"""Writes models large enough to measure memory with: random weights, made fast by repeating one tile.

Tensors and metadata are those that llama.cpp's src/models/*.cpp load, as in `architectures.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from tests.helpers.ggufs import WORDS, _pieces

CONTEXT_LENGTH = 16_384
_TILE_ELEMENTS = 1 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Large:
    """A model's sizes; `kv_heads` 0 in a layer: a recurrent one. `vocab` is filled up with numbered words."""

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: tuple[int, ...] | int
    feed_forward: int
    vocab: int = 4096
    head_length: int | None = None
    experts: int = 0
    window: int | None = None
    state: int = 0
    tied: bool = False


def write_large(path: Path, made: Large, dtype: str = "Q8_0") -> Path:
    """Writes the model with matrices of `dtype`; equal arguments give equal bytes."""
    pieces = _vocabulary(made.vocab)
    writer = GGUFWriter(path, made.architecture)
    writer.add_type("model")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(made.width)
    writer.add_block_count(made.layers)
    writer.add_feed_forward_length(made.feed_forward)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(made.vocab)
    _add_attention(writer, made)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece, _ in pieces])
    writer.add_token_scores([-float(index) for index in range(len(pieces))])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    tile = _tile(GGMLQuantizationType[dtype])
    for name, shape in _tensors(made):
        kind = GGMLQuantizationType.F32 if _is_small(name, shape) else GGMLQuantizationType[dtype]
        if kind is GGMLQuantizationType.F32:
            writer.add_tensor(name, _vector(name, shape), raw_dtype=kind)
        else:
            size = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor(name, np.resize(tile, size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(size: int) -> list[tuple[str, gguf.TokenType]]:
    pieces = _pieces(WORDS)
    more = [(f"▁w{index}", gguf.TokenType.NORMAL) for index in range(size - len(pieces))]
    return [*pieces, *more]


def _add_attention(writer: GGUFWriter, made: Large) -> None:
    writer.add_head_count(made.heads)
    writer.add_head_count_kv(made.kv_heads if isinstance(made.kv_heads, int) else list(made.kv_heads))
    length = made.head_length or made.width // made.heads
    writer.add_key_length(length)
    writer.add_value_length(length)
    writer.add_rope_dimension_count(length)
    if made.window is not None:
        writer.add_sliding_window(made.window)
    if made.experts:
        writer.add_expert_count(made.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(made.feed_forward)
    if made.state:
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * made.width)
        writer.add_ssm_state_size(made.state)
        writer.add_ssm_time_step_rank(made.width // 16)


def _tensors(made: Large) -> list[tuple[str, Shape]]:
    found: list[tuple[str, Shape]] = [("token_embd.weight", (made.vocab, made.width))]
    for index in range(made.layers):
        kv_heads = made.kv_heads if isinstance(made.kv_heads, int) else made.kv_heads[index]
        parts = {**(_attention(made, kv_heads) if kv_heads else _mamba(made)), **_feed_forward(made)}
        found += [(f"blk.{index}.{name}", shape) for name, shape in parts.items()]
    found.append(("output_norm.weight", (made.width,)))
    return found if made.tied else [*found, ("output.weight", (made.vocab, made.width))]


def _attention(made: Large, kv_heads: int) -> dict[str, Shape]:
    length = made.head_length or made.width // made.heads
    parts: dict[str, Shape] = {
        "attn_norm.weight": (made.width,),
        "attn_q.weight": (made.heads * length, made.width),
        "attn_k.weight": (kv_heads * length, made.width),
        "attn_v.weight": (kv_heads * length, made.width),
        "attn_output.weight": (made.width, made.heads * length),
    }
    if made.architecture == "gemma2":
        parts |= {"post_attention_norm.weight": (made.width,), "post_ffw_norm.weight": (made.width,)}
    if made.architecture.startswith("qwen3"):
        parts |= {f"attn_{part}_norm.weight": (length,) for part in "qk"}
    return parts


def _feed_forward(made: Large) -> dict[str, Shape]:
    width, inner, experts = made.width, made.feed_forward, made.experts
    norm: dict[str, Shape] = {"ffn_norm.weight": (width,)}
    if experts:
        return {
            **norm,
            "ffn_gate_inp.weight": (experts, width),
            "ffn_gate_exps.weight": (experts, inner, width),
            "ffn_up_exps.weight": (experts, inner, width),
            "ffn_down_exps.weight": (experts, width, inner),
        }
    return {
        **norm,
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (inner, width),
        "ffn_down.weight": (width, inner),
    }


def _mamba(made: Large) -> dict[str, Shape]:
    width, inner, state, rank = made.width, 2 * made.width, made.state, made.width // 16
    return {
        "attn_norm.weight": (width,),
        "ssm_in.weight": (2 * inner, width),
        "ssm_conv1d.weight": (inner, 4),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt_norm.weight": (rank,),
        "ssm_b_norm.weight": (state,),
        "ssm_c_norm.weight": (state,),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (width, inner),
    }


def _is_small(name: str, shape: Shape) -> bool:
    """What llama.cpp wants in F32, or what has rows too short for blocks."""
    return len(shape) == 1 or "conv1d" in name or "ssm_a" in name or "gate_inp" in name or shape[-1] % 256 > 0


def _vector(name: str, shape: Shape) -> NDArray[np.float32]:
    if name.endswith("ssm_a"):
        return -np.tile(np.arange(1, shape[1] + 1, dtype=np.float32), (shape[0], 1))
    if name.endswith("ssm_dt.bias"):
        return np.full(shape, -3, np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return np.random.default_rng(1).normal(0, shape[-1] ** -0.5, shape).astype(np.float32)


def _tile(kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.02, (_TILE_ELEMENTS // 256, 256)).astype(np.float32)
    return gguf.quants.quantize(values, kind).reshape(-1).view(np.uint8)
