"""Values that server, worker and engine share: options, parameters, results.

Plain msgspec structs: they travel in frames as they are. Knows no gRPC, no
process and no llama.cpp.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import msgspec

from .errors import FieldViolation, InvalidField

MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ
MAX_STOP_SEQUENCES = 16
MAX_STOP_SEQUENCE_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**32 - 1


class ModelState(enum.Enum):
    """Where a model stands in its life; names as in the contract."""

    ABSENT = "absent"
    AVAILABLE = "available"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


class StateReason(enum.Enum):
    """More about a state than its name tells."""

    LOAD_FAILED = "load_failed"
    WORKER_CRASHED = "worker_crashed"


class LoadStage(enum.Enum):
    """What a load is doing."""

    STARTING = "starting"
    WEIGHTS = "weights"
    CONTEXT = "context"
    WARMUP = "warmup"


class KvCacheType(enum.Enum):
    """Number format of the KV cache."""

    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


class FinishReason(enum.Enum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"


class LoadOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is loaded; None is "not asked for"."""

    context_length: int | None = None
    max_sequences: int | None = None
    kv_cache_tokens: int | None = None
    gpu_layers: int | None = None
    threads: int | None = None
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    kv_cache_type: KvCacheType | None = None
    flash_attention: bool | None = None
    mmap: bool | None = None
    mlock: bool | None = None
    repack: bool | None = None

    def over(self, base: LoadOptions) -> LoadOptions:
        """These options, with `base`'s values where nothing is asked for."""
        mine = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(base, **mine)

    def differing(self, effective: LoadOptions) -> list[str]:
        """Names of the fields that are asked for and differ from `effective`."""
        return [
            name
            for name in self.__struct_fields__
            if getattr(self, name) is not None and getattr(self, name) != getattr(effective, name)
        ]

    def violations(self, prefix: str = "options") -> list[FieldViolation]:
        """All fields that are out of their limits, as the contract states them."""
        limits = {
            "context_length": (1, 2**24),
            "max_sequences": (1, MAX_SEQUENCES),
            "kv_cache_tokens": (1, 2**26),
            "gpu_layers": (-1, 10_000),
            "threads": (1, 512),
            "batch_tokens": (32, 8192),
            "micro_batch_tokens": (32, self.batch_tokens or 8192),
        }
        found = []
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                found.append(FieldViolation(f"{prefix}.{name}", f"must be {low} to {high}, is {value}"))
        return found


class SamplingParams(msgspec.Struct, frozen=True):
    """How tokens are drawn, complete: request over model over server defaults.

    Ranges are those of `violations`; meaning and defaults are told in the
    contract's `SamplingParams`.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.1
    repetition_window: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def uses_penalties(self) -> bool:
        """Whether tokens seen before change the draw."""
        changed = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)
        return self.repetition_window != 0 and changed

    def violations(self, prefix: str = "sampling") -> list[FieldViolation]:
        """All fields that are out of their limits, as the contract states them."""
        ranges: dict[str, tuple[float, float]] = {
            "temperature": (0, 100),
            "min_p": (0, 1),
            "frequency_penalty": (-2, 2),
            "presence_penalty": (-2, 2),
            "top_k": (0, 2**31 - 1),
            "repetition_window": (-1, 2**20),
            "seed": (0, MAX_SEED),
        }
        found = []
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                found.append(FieldViolation(f"{prefix}.{name}", f"must be {low} to {high}, is {value}"))
        for name, high in {"top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 10.0}.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 < value <= high:
                found.append(
                    FieldViolation(f"{prefix}.{name}", f"must be above 0 and at most {high:g}, is {value}")
                )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            text = f"at most {MAX_LOGIT_BIAS} entries, has {len(self.logit_bias)}"
            found.append(FieldViolation(f"{prefix}.logit_bias", text))
        for place, (_, bias) in enumerate(self.logit_bias):
            if not math.isfinite(bias) or abs(bias) > 1000:
                text = f"must be -1000 to 1000, is {bias}"
                found.append(FieldViolation(f"{prefix}.logit_bias[{place}].bias", text))
        return found


class GenerationDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's own values for what requests leave unset; None keeps the server's."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repetition_window: int | None = None
    max_tokens: int | None = None

    def violations(self, prefix: str = "defaults") -> list[FieldViolation]:
        """All fields that are out of their limits, as the contract states them."""
        values = msgspec.structs.asdict(self)
        most = values.pop("max_tokens")
        # Unset fields have good values, so all that is found wrong was set.
        set_values = {name: value for name, value in values.items() if value is not None}
        found = SamplingParams(**set_values).violations(prefix)
        if most is not None and most < 1:
            found.append(FieldViolation(f"{prefix}.max_tokens", f"must be 1 or more, is {most}"))
        return found


DEFAULT_MAX_TOKENS = 512
DEFAULT_CONTEXT_LENGTH = 2048


class StopParams(msgspec.Struct, frozen=True):
    """When a generation ends. `max_tokens` None: `default_max_tokens` or what is left."""

    max_tokens: int | None = None
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    sequences: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def violations(self, prefix: str = "stop") -> list[FieldViolation]:
        """All fields that are out of their limits, as the contract states them."""
        found = []
        if self.max_tokens is not None and self.max_tokens < 0:
            found.append(FieldViolation(f"{prefix}.max_tokens", f"must be 0 or more, is {self.max_tokens}"))
        if len(self.sequences) > MAX_STOP_SEQUENCES:
            text = f"at most {MAX_STOP_SEQUENCES}, has {len(self.sequences)}"
            found.append(FieldViolation(f"{prefix}.sequences", text))
        for place, text in enumerate(self.sequences):
            size = len(text.encode())
            if not 1 <= size <= MAX_STOP_SEQUENCE_BYTES:
                limit = f"must be 1 to {MAX_STOP_SEQUENCE_BYTES} bytes, is {size}"
                found.append(FieldViolation(f"{prefix}.sequences[{place}]", limit))
        if len(self.token_ids) > MAX_STOP_TOKENS:
            text = f"at most {MAX_STOP_TOKENS}, has {len(self.token_ids)}"
            found.append(FieldViolation(f"{prefix}.token_ids", text))
        return found


class PromptInput(msgspec.Struct, frozen=True, tag="prompt"):
    """Text; control tokens in it are recognised only with `parse_special`."""

    text: str
    add_special: bool = True
    parse_special: bool = False


class TokensInput(msgspec.Struct, frozen=True, tag="tokens"):
    """Ready token ids."""

    ids: list[int]


class ChatTurn(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str


class ChatInput(msgspec.Struct, frozen=True, tag="chat"):
    """A conversation, rendered with the model's template."""

    messages: list[ChatTurn]
    add_generation_prompt: bool = True
    template_kwargs: dict[str, Any] = {}


GenerationInput = PromptInput | TokensInput | ChatInput


class Usage(msgspec.Struct, frozen=True):
    """Token counts; `cached_tokens` is included in `prompt_tokens`."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """Seconds by phase. `ttft_s` is filled where the text is sent."""

    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float
    ttft_s: float = 0.0


class StopCause(msgspec.Struct, frozen=True):
    """What ended a generation with STOP; one field is set."""

    eog_token: int | None = None
    sequence: str | None = None
    token_id: int | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """What a loaded model is, as llama.cpp tells it."""

    description: str
    architecture: str
    vocab_size: int
    context_length_train: int
    parameter_count: int
    weights_bytes: int
    has_chat_template: bool


class EngineStats(msgspec.Struct, frozen=True):
    """Counters that only grow, and gauges of this moment."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    running: int = 0
    waiting: int = 0
    kv_used_tokens: int = 0


def check(*groups: list[FieldViolation]) -> None:
    """Raises InvalidField naming every violation of all groups; nothing if there is none."""
    found = [violation for group in groups for violation in group]
    if found:
        raise InvalidField.of(found)
