"""The options of a load that nobody asked for, chosen from the model and the machine.

Used by the worker that loads, and by the server that plans the load: both must come to the same.
"""

from __future__ import annotations

import dataclasses

from .errors import InvalidField
from .types import DEFAULT_CONTEXT_LENGTH, MAX_SEQUENCES, KvCacheType, LoadOptions

# The kernels work in tiles of 16 rows: beyond it a step of decode tokens costs in proportion.
SEQUENCES_PER_CORE, FEWEST_SEQUENCES, MOST_SEQUENCES = 4, 4, 16
# Of the memory that is free when the model is in: more would be taken from the page cache of its weights.
KV_SHARE_OF_MEMORY = 1 / 8
# Kept states of ended sequences are as large as the KV cache at most.
SNAPSHOT_SHARE_OF_MEMORY = 1 / 8
BATCH_TOKENS = 512
# Beyond what runs, ids hold prefixes of ended sequences.
IDS_PER_SEQUENCE, FEWEST_IDS = 4, 32
# Rows with logits for log probabilities of prompts, beside one for each id.
PROMPT_OUTPUTS = 32
# Bytes of a value in the KV cache: a block's bytes by the values in it.
KV_VALUE_BYTES = {
    KvCacheType.F16: 2.0,
    KvCacheType.BF16: 2.0,
    KvCacheType.Q8_0: 34 / 32,
    KvCacheType.Q4_0: 18 / 32,
}
_CELLS_STEP = 256
# Values that share a scale in a quantized KV cache.
_KV_BLOCK = 32
_QUANTIZED = (KvCacheType.Q8_0, KvCacheType.Q4_0)


@dataclasses.dataclass(frozen=True, slots=True)
class Situation:
    """What the choice depends on.

    `kv_token_bytes` by type of the KV cache; `head_widths` of a key and of a value.
    """

    context_length_train: int
    cores: int
    gpu_layers: int
    free_bytes: int
    kv_token_bytes: dict[KvCacheType, float]
    can_share_ids: bool
    head_widths: tuple[int, ...] = ()


def choose(asked: LoadOptions, here: Situation) -> LoadOptions:
    """`asked`, with all that was left open. Raises InvalidField for what cannot be together."""
    train = here.context_length_train
    if asked.context_length is not None and asked.context_length > train:
        limit = f"must be 1 to {train}, the model's own context; is {asked.context_length}"
        raise InvalidField("options.context_length", limit)
    context = asked.context_length or min(DEFAULT_CONTEXT_LENGTH, train)
    if asked.kv_cache_tokens is not None and asked.kv_cache_tokens < context:
        if asked.context_length is not None:
            limit = f"must be at least context_length {context}, is {asked.kv_cache_tokens}"
            raise InvalidField("options.kv_cache_tokens", limit)
        context = asked.kv_cache_tokens
    kv_type = asked.kv_cache_type or KvCacheType.F16
    if kv_type in _QUANTIZED:
        _check_quantized(kv_type, asked, here)
    sequences = asked.max_sequences or _sequences(context * here.kv_token_bytes[kv_type], here)
    pool = asked.kv_cache_tokens or context * sequences
    # Parts cost no attention over what others have; too small a cache for them is shared as a whole.
    wants_unified = pool < context * sequences if asked.kv_unified is None else asked.kv_unified
    unified = here.can_share_ids and wants_unified
    if not unified and pool < context * sequences:
        limit = f"must be {context * sequences} or more, a context for each sequence, without kv_unified"
        raise InvalidField("options.kv_cache_tokens", f"{limit}; is {pool}")
    # llama.cpp aborts the process when a batch cannot hold a token of every sequence.
    batch = max(asked.batch_tokens or BATCH_TOKENS, sequence_ids(sequences, unified) + PROMPT_OUTPUTS)
    return LoadOptions(
        context_length=context,
        max_sequences=sequences,
        kv_cache_tokens=pool,
        kv_unified=unified,
        kv_cache_type=kv_type,
        gpu_layers=here.gpu_layers,
        threads=asked.threads or here.cores,
        batch_tokens=batch,
        micro_batch_tokens=min(asked.micro_batch_tokens or BATCH_TOKENS, batch),
        flash_attention=asked.flash_attention,
        mmap=asked.mmap is not False,
        mlock=asked.mlock is True,
        repack=asked.repack is not False,
    )


def _check_quantized(kv_type: KvCacheType, asked: LoadOptions, here: Situation) -> None:
    """Raises InvalidField where llama.cpp would make no context."""
    if asked.flash_attention is False:
        raise InvalidField("options.kv_cache_type", f"{kv_type.value} needs flash_attention, which is false")
    for width in here.head_widths:
        if width % _KV_BLOCK:
            limit = (
                f"{kv_type.value} needs heads of a multiple of {_KV_BLOCK} values, the model's have {width}"
            )
            raise InvalidField("options.kv_cache_type", limit)


def sequence_ids(max_sequences: int, unified: bool) -> int:
    """Places in the KV cache: in a unified one also for prefixes that no running sequence holds."""
    if not unified:
        return max_sequences
    return min(MAX_SEQUENCES, max(IDS_PER_SEQUENCE * max_sequences, FEWEST_IDS))


def kv_cells(options: LoadOptions) -> int:
    """Tokens that the KV cache of effective options has room for: llama.cpp rounds each part up."""
    pool, parts = options.kv_cache_tokens or 0, 1 if options.kv_unified else options.max_sequences or 1
    return -(-(pool // parts) // _CELLS_STEP) * _CELLS_STEP * parts


def _sequences(kv_bytes_each: float, here: Situation) -> int:
    most = MOST_SEQUENCES
    if here.gpu_layers == 0:
        most = max(FEWEST_SEQUENCES, min(MOST_SEQUENCES, SEQUENCES_PER_CORE * here.cores))
    room = here.free_bytes * KV_SHARE_OF_MEMORY
    return max(1, min(most, int(room / max(1.0, kv_bytes_each))))
