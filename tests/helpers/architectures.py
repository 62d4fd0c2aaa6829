"""Writes tiny models whose memory is not plain attention, with random weights.

Tensors and metadata are those that llama.cpp's src/models/*.cpp load. A numpy
shape is the reverse of a ggml shape. The `gguf` package has the keys of all
that are here; RWKV and hybrids with Mamba 2 or a sliding window are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from tests.helpers.ggufs import WORDS, _pieces

WINDOW = 16
"""Tokens that a sliding-window layer sees."""

_EMBD, _HEADS, _FF, _LAYERS = 32, 2, 64, 2
_INNER, _STATE, _CONV, _RANK = 2 * _EMBD, 8, 4, 4  # of Mamba; an expansion of 2 is all that llama.cpp takes
_EXPERTS, _EXPERTS_USED = 4, 2
_SHORT_CONV = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """How a model is made, and what its KV cache is: the name is llama.cpp's."""

    name: str
    layers: tuple[dict[str, Shape], ...]
    add_metadata: Callable[[GGUFWriter], None]
    can_cut: bool
    output_norm: str = "output_norm"


def _ffn() -> dict[str, Shape]:
    return {
        "ffn_norm.weight": (_EMBD,),
        "ffn_gate.weight": (_FF, _EMBD),
        "ffn_up.weight": (_FF, _EMBD),
        "ffn_down.weight": (_EMBD, _FF),
    }


def _experts() -> dict[str, Shape]:
    return {
        "ffn_norm.weight": (_EMBD,),
        "ffn_gate_inp.weight": (_EXPERTS, _EMBD),
        "ffn_gate_exps.weight": (_EXPERTS, _FF, _EMBD),
        "ffn_up_exps.weight": (_EXPERTS, _FF, _EMBD),
        "ffn_down_exps.weight": (_EXPERTS, _EMBD, _FF),
    }


def _attention(*norms: str) -> dict[str, Shape]:
    """`norms` are those of single heads."""
    square = (_EMBD, _EMBD)
    return {
        "attn_norm.weight": (_EMBD,),
        **{f"attn_{part}.weight": square for part in ("q", "k", "v", "output")},
        **{f"{norm}.weight": (_EMBD // _HEADS,) for norm in norms},
    }


def _mamba(*, with_norms: bool) -> dict[str, Shape]:
    norms: dict[str, Shape] = {"ssm_dt_norm.weight": (_RANK,)}
    norms |= {f"ssm_{part}_norm.weight": (_STATE,) for part in "bc"}
    return {
        "attn_norm.weight": (_EMBD,),
        "ssm_in.weight": (2 * _INNER, _EMBD),
        "ssm_conv1d.weight": (_INNER, _CONV),
        "ssm_conv1d.bias": (_INNER,),
        "ssm_x.weight": (_RANK + 2 * _STATE, _INNER),
        "ssm_dt.weight": (_INNER, _RANK),
        "ssm_dt.bias": (_INNER,),
        "ssm_a": (_INNER, _STATE),
        "ssm_d": (_INNER,),
        "ssm_out.weight": (_EMBD, _INNER),
        **(norms if with_norms else {}),
    }


def _short_conv() -> dict[str, Shape]:
    return {
        "attn_norm.weight": (_EMBD,),
        "shortconv.conv.weight": (_EMBD, _SHORT_CONV),
        "shortconv.in_proj.weight": (3 * _EMBD, _EMBD),
        "shortconv.out_proj.weight": (_EMBD, _EMBD),
    }


def _add_heads(writer: GGUFWriter) -> None:
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_rope_dimension_count(_EMBD // _HEADS)


def _add_window(writer: GGUFWriter) -> None:
    _add_heads(writer)
    writer.add_sliding_window(WINDOW)


def _add_experts(writer: GGUFWriter) -> None:
    _add_heads(writer)
    writer.add_expert_count(_EXPERTS)
    writer.add_expert_used_count(_EXPERTS_USED)


def _add_mamba(writer: GGUFWriter) -> None:
    writer.add_ssm_conv_kernel(_CONV)
    writer.add_ssm_inner_size(_INNER)
    writer.add_ssm_state_size(_STATE)
    writer.add_ssm_time_step_rank(_RANK)


def _add_only_mamba(writer: GGUFWriter) -> None:
    writer.add_head_count(0)
    _add_mamba(writer)


def _add_jamba(writer: GGUFWriter) -> None:
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv([0, _HEADS])  # 0: a recurrent layer
    _add_mamba(writer)


def _add_short_conv(writer: GGUFWriter) -> None:
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv([0, _HEADS])
    writer.add_shortconv_l_cache(_SHORT_CONV)


_WINDOW_LAYER = {
    **_attention(),
    "post_attention_norm.weight": (_EMBD,),
    **_ffn(),
    "post_ffw_norm.weight": (_EMBD,),
}
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")

ARCHITECTURES = {
    # Every second layer sees WINDOW tokens only.
    "gemma2": Architecture("gemma2", (_WINDOW_LAYER,) * _LAYERS, _add_window, can_cut=True),
    "moe": Architecture("llama", ({**_attention(), **_experts()},) * _LAYERS, _add_experts, can_cut=True),
    "mamba": Architecture("mamba", (_mamba(with_norms=False),) * _LAYERS, _add_only_mamba, can_cut=False),
    "jamba": Architecture(
        "jamba",
        ({**_mamba(with_norms=True), **_ffn()}, {**_attention(), **_ffn()}),
        _add_jamba,
        can_cut=False,
    ),
    "lfm2": Architecture(
        "lfm2",
        ({**_short_conv(), **_ffn()}, {**_attention(*_HEAD_NORMS), **_ffn()}),
        _add_short_conv,
        can_cut=False,
        output_norm="token_embd_norm",
    ),
}
"""Attention with a sliding window, a mixture of experts, a recurrent model, and two hybrids."""


def write_architecture(path: Path, name: str, *, seed: int = 0, context_length: int = 1024) -> Path:
    """Writes the model of `ARCHITECTURES`, below 1 MB; SPM tokenizer with byte fallback and `WORDS`."""
    made = ARCHITECTURES[name]
    pieces = _pieces(WORDS)
    writer = GGUFWriter(path, made.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(context_length)
    writer.add_embedding_length(_EMBD)
    writer.add_block_count(len(made.layers))
    writer.add_feed_forward_length(_FF)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    made.add_metadata(writer)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece, _ in pieces])
    writer.add_token_scores([-float(index) for index in range(len(pieces))])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    rng = np.random.default_rng(seed)
    writer.add_tensor("token_embd.weight", _weights(rng, "token_embd.weight", (len(pieces), _EMBD)))
    for index, layer in enumerate(made.layers):
        for tensor, shape in layer.items():
            writer.add_tensor(f"blk.{index}.{tensor}", _weights(rng, tensor, shape))
    writer.add_tensor(f"{made.output_norm}.weight", np.ones(_EMBD, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(rng: np.random.Generator, tensor: str, shape: Shape) -> NDArray[np.float32]:
    """Random, but so that a recurrent state neither dies nor grows."""
    if tensor == "ssm_a":
        return -np.tile(np.arange(1, shape[1] + 1, dtype=np.float32), (shape[0], 1))
    if tensor == "ssm_dt.bias":
        return np.full(shape, -3, np.float32)  # softplus: time steps of 0.05
    if tensor.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
