"""The network: llama.cpp's `llama` architecture (RMSNorm, interleaved RoPE, grouped KV heads, SwiGLU).

Parameter names follow GGUF tensor names, so `export.py` needs no table of names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network. Row lengths must be multiples of 32 for Q8_0."""

    vocab: int = 2048
    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    feed_forward: int = 768
    context: int = 2048
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind its norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.config = config
        self.attn_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, kv_width, bias=False)
        self.attn_v = nn.Linear(width, kv_width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.ffn_gate = nn.Linear(width, config.feed_forward, bias=False)
        self.ffn_up = nn.Linear(width, config.feed_forward, bias=False)
        self.ffn_down = nn.Linear(config.feed_forward, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps (rows, positions, width) to the same shape."""
        rows, length, width = x.shape
        config = self.config
        h = self.attn_norm(x)
        q = self.attn_q(h).view(rows, length, config.heads, config.head_dim).transpose(1, 2)
        k = self.attn_k(h).view(rows, length, config.kv_heads, config.head_dim).transpose(1, 2)
        v = self.attn_v(h).view(rows, length, config.kv_heads, config.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        groups = config.heads // config.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        # float32: the backward kernel for bfloat16 is several times slower on processors.
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        x = x + self.attn_output(y.transpose(1, 2).reshape(rows, length, width))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class DemoModel(nn.Module):
    """The whole network; the output matrix is the embedding (tied)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.vocab, config.width)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Residual branches start small, so depth does not blow up the sum.
                branch = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if branch else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Final hidden states (rows, positions, width) of token ids (rows, positions)."""
        cos, sin = _angles(ids.shape[1], self.config)
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary."""
        return F.linear(hidden, self.token_embd.weight)


def _angles(length: int, config: ModelConfig) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequency = config.rope_base ** (-half / config.head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Neighbouring elements form a pair: ggml's NORM layout, used by the `llama` architecture.
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
