"""What the parts of a model take, from its header: weights, KV cache and states by layer, a step's work.

The formulas are those of llama.cpp's hyper-parameters, KV cache and graphs for the architectures in
use; a dry run by a probe worker knows better where there is a file to run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import ModelFileInvalid
from ..load_plan import KV_VALUE_BYTES, PROMPT_OUTPUTS, kv_cells, sequence_ids
from ..types import KvCacheType, LoadOptions
from .gguf_types import MAX_LAYERS, GgufHeader, TensorInfo

RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
HYBRID = frozenset(
    (
        "jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe",
        "qwen3next", "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next", "qwen35", "qwen35moe", "qwen4exp",
        "deepseek4", "minimax-01",
    )
)  # fmt: skip
INPUT = -1
"""Stands for the layer before the first one, which llama.cpp keeps on the host."""

_BLOCK = re.compile(r"blk\.(\d{1,4})\.")
_F32, _MASK_VALUE = 4, 2  # bytes
# Widths of the buffers that live at once in a graph: of the feed-forward part, of a state, of the rest.
_FEED_FORWARD_BUFFERS, _STATE_BUFFERS, _OTHER_BUFFERS = 3, 5, 4


class ModelSizes:
    """A model's parts by layer: 0 to `layers` - 1, `layers` is the output, INPUT the input."""

    def __init__(self, header: GgufHeader) -> None:
        """Raises ModelFileInvalid for a header without what llama.cpp needs as well."""
        self.header = header
        self.layers = _needed(header, "block_count")
        if self.layers > MAX_LAYERS:
            raise ModelFileInvalid(_name(header), f"it has {self.layers:,} layers, more than {MAX_LAYERS:,}")
        self.width = _needed(header, "embedding_length")
        self.context_length_train = _needed(header, "context_length")
        self.vocabulary = header.vocabulary_size or 0
        self.is_recurrent = header.architecture in RECURRENT
        self.can_share_ids = not self.is_recurrent and header.architecture not in HYBRID
        self.is_tied = not any(tensor.name == "output.weight" for tensor in header.tensors)
        self._recurrent_layers = self._find_recurrent_layers()
        if not self.is_recurrent and not (header.head_counts and any(header.head_counts)):
            raise ModelFileInvalid(_name(header), "it does not say how many attention heads it has")

    def layer_of(self, tensor: TensorInfo) -> int:
        """The layer that a tensor belongs to."""
        if match := _BLOCK.match(tensor.name):
            return min(int(match[1]), self.layers)
        return self.layers if tensor.name.startswith("output") else INPUT

    def output_copy(self) -> TensorInfo | None:
        """What is taken for the output a second time, on another device or rearranged: the embeddings."""
        if not self.is_tied:
            return None
        return next((tensor for tensor in self.header.tensors if tensor.name == "token_embd.weight"), None)

    def kv_token_bound(self, kv_type: KvCacheType) -> float:
        """A token's bytes in the KV cache as the worker counts them for its choice: by the first layer."""
        if self.is_recurrent:
            return 0.0
        kv_heads = (self.header.kv_head_counts or (0,))[0] or self._heads
        return float(self.layers * sum(self.head_widths) * kv_heads * KV_VALUE_BYTES[kv_type])

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Values of a head's key and of its value, by the first layer; none of a model without attention."""
        if self.is_recurrent:
            return ()
        lengths = [self.header.number(f"attention.{part}_length") for part in ("key", "value")]
        return tuple(length or self.width // self._heads for length in lengths)

    @property
    def _heads(self) -> int:
        return (self.header.head_counts or (1,))[0] or 1

    def kv_bytes(self, options: LoadOptions) -> list[float]:
        """Each layer's KV cache and states with these effective options; layers with a window in full."""
        assert options.kv_cache_type is not None
        cells, states = kv_cells(options), _ids(options)
        value_bytes = KV_VALUE_BYTES[options.kv_cache_type]
        found = []
        for values, state in zip(self._kv_values(), self._state_values(), strict=True):
            found.append(cells * values * value_bytes + states * state * _F32)
        return found

    def compute_bytes(self, options: LoadOptions) -> int:
        """Buffers of the largest step: its widest layer with the mask or all logits; rows of logits."""
        header, cells = self.header, kv_cells(options)
        tokens = min(options.micro_batch_tokens or 1, cells)
        seen = cells if options.kv_unified else cells // (options.max_sequences or 1)
        attention = 0 if self.is_recurrent else seen * _MASK_VALUE
        if options.flash_attention is False and not self.is_recurrent:
            attention = seen * _F32 * (1 + max(header.head_counts or (1,)))
        states = 0
        if any(self._recurrent_layers):
            states = _STATE_BUFFERS * (header.number("ssm.inner_size") or self.width)
        widest = max(_FEED_FORWARD_BUFFERS * self._feed_forward(), states) + _OTHER_BUFFERS * self.width
        ids = _ids(options)
        logits = (ids + PROMPT_OUTPUTS) * (self.vocabulary + 2 * self.width) * _F32
        return max(tokens * (widest * _F32 + attention), logits) + ids * self.vocabulary * _F32

    def _feed_forward(self) -> int:
        """The widest of all layers, over all experts that a token meets."""
        header = self.header
        dense = max(header.per_layer("feed_forward_length") or (4 * self.width,))
        if not header.expert_count:
            return dense
        expert = header.number("expert_feed_forward_length") or dense
        return max(dense, expert * (header.expert_used_count or 1))

    def _kv_values(self) -> list[int]:
        """Values of each layer that a token has in the KV cache."""
        header = self.header
        if self.is_recurrent:
            return [0] * self.layers
        key, value = (
            max(length or 0, header.number(f"attention.{part}_length_swa") or 0)
            for part, length in (("key", header.key_length), ("value", header.value_length))
        )
        if header.number("attention.key_length_mla"):
            value = 0  # a part of the key is read as the value
        lack = (header.number("attention.shared_kv_layers") or 0) + (
            header.number("nextn_predict_layers") or 0
        )
        has_own = self.layers - lack
        every_layer_attends = not any(heads == 0 for heads in header.kv_head_counts or ())
        found = []
        for index, heads in enumerate(header.kv_head_counts or (0,) * self.layers):
            only_state = self._recurrent_layers[index] and (
                not every_layer_attends or header.number("full_attention_interval") is not None
            )
            found.append(heads * (key + value) if index < has_own and not only_state else 0)
        return found

    def _state_values(self) -> list[int]:
        """Values of each layer that a sequence has beside the KV cache."""
        state = self._layer_state()
        return [state if recurrent else 0 for recurrent in self._recurrent_layers]

    def _layer_state(self) -> int:
        header, width = self.header, self.width
        if head := header.number("wkv.head_size"):
            return width * (header.number("token_shift_count") or 2) + width * head
        if cache := header.number("shortconv.l_cache"):
            return width * (cache - 1)
        kernel = header.number("ssm.conv_kernel") or 1
        if head := header.number("kda.head_dim"):
            heads = max(header.head_counts or (0,))
            return 3 * (kernel - 1) * heads * head + head * head * heads
        inner, state = header.number("ssm.inner_size") or 0, header.number("ssm.state_size") or 0
        groups = header.number("ssm.group_count") or 0
        return (kernel - 1) * (inner + 2 * groups * state) + state * inner

    def _find_recurrent_layers(self) -> Sequence[bool]:
        if self.can_share_ids:
            return [False] * self.layers
        heads, interval = self.header.kv_head_counts, self.header.number("full_attention_interval")
        if interval:
            return [(index + 1) % interval > 0 for index in range(self.layers)]
        if not self.is_recurrent and heads and 0 in heads:
            return [count == 0 for count in heads]
        return [True] * self.layers


def _ids(options: LoadOptions) -> int:
    return sequence_ids(options.max_sequences or 1, options.kv_unified is True)


def _needed(header: GgufHeader, name: str) -> int:
    value = header.number(name)
    if not value:
        raise ModelFileInvalid(_name(header), f"it does not say its {name}")
    return value


def _name(header: GgufHeader) -> str:
    return header.name or "the model"
