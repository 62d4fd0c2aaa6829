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
    keep_alive: Seconds | None
