"""The keyword arguments of both clients. A key left out or None is unset: the server or the model decides.

Meaning, default and limit of each are in the comments of `protos/bear_grpc/v1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypedDict

from bear_grpc.v1.inference_service_pb2 import ChatMessage

Seconds = float | timedelta
PriorityName = Literal["low", "normal", "high"]
OverflowName = Literal["error", "truncate_left", "truncate_middle"]
KvCacheTypeName = Literal["f16", "bf16", "q8_0", "q4_0"]
SamplerName = Literal[
    "penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature"
]
# {"role": ..., "content": a text or several}
Message = ChatMessage | Mapping[str, Any]


class DefaultsOptions(TypedDict, total=False):
    """`SamplingOverrides`: a registered model's own defaults."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    repetition_window: int | None
    max_tokens: int | None


class GenerateOptions(TypedDict, total=False):
    """`GenerateRequest` without model and prompt, laid flat."""

    # Instead of a prompt.
    token_ids: Sequence[int] | None
    messages: Sequence[Message] | None
    add_generation_prompt: bool | None
    template_kwargs: Mapping[str, Any] | None
    # SamplingParams
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    repetition_window: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_window: int | None
    dry_sequence_breakers: Sequence[str] | None
    dynamic_temperature_range: float | None
    dynamic_temperature_exponent: float | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    adaptive_p_target: float | None
    adaptive_p_decay: float | None
    min_keep: int | None
    sampler_order: Sequence[SamplerName | int] | None
    # StopParams
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    # Constraint, one of them
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    choices: Sequence[str] | None
    lark: str | None
    gbnf: str | None
    # OutputOptions
    logprobs: bool | None
    top_logprobs: int | None
    return_token_ids: bool | None
    prefill_progress: bool | None
    queue_progress: bool | None
    echo: bool | None
    # The request itself
    n: int | None
    priority: PriorityName | int | None
    overflow_policy: OverflowName | int | None
    load_if_needed: bool | None
    keep_alive: Seconds | None
    client_tag: str | None
    request_id: str | None
    fail_on_restart: bool | None


class LoadOptions(TypedDict, total=False):
    """`LoadOptions` of the contract."""

    context_length: int | None
    max_sequences: int | None
    kv_cache_tokens: int | None
    gpu_layers: int | None
    threads: int | None
    batch_tokens: int | None
    micro_batch_tokens: int | None
    kv_cache_type: KvCacheTypeName | int | None
    flash_attention: bool | None
    mmap: bool | None
    mlock: bool | None
    repack: bool | None
    kv_unified: bool | None
    keep_alive: Seconds | None
    pinned: bool | None
