"""What a generation is asked with: input, sampling, ends, constraint, output.

Plain msgspec structs: they travel in frames as they are. Knows no gRPC, no
process and no llama.cpp. Ranges are those of `violations`; meaning and
defaults are told in the contract.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated, Any

import msgspec

from .errors import FieldViolation
from .input_limits import DEFAULT_LIMITS, InputLimits

MAX_SEED = 2**32 - 1


class SamplerKind(enum.Enum):
    """A filter of the sampler chain; names as in the contract."""

    PENALTIES = "penalties"
    DRY = "dry"
    TOP_N_SIGMA = "top_n_sigma"
    TOP_K = "top_k"
    TYPICAL_P = "typical_p"
    TOP_P = "top_p"
    MIN_P = "min_p"
    XTC = "xtc"
    TEMPERATURE = "temperature"


# llama-server's order (common.h), and its sequence breakers of DRY.
SAMPLER_ORDER = tuple(SamplerKind)
DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")
MAX_DRY_BREAKERS = 16
MAX_DRY_BREAKER_BYTES = 40  # llama.cpp cuts longer ones


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
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = -1
    dry_sequence_breakers: tuple[str, ...] = DRY_SEQUENCE_BREAKERS
    dynamic_temperature_range: float = 0.0
    dynamic_temperature_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_p_target: float | None = None
    adaptive_p_decay: float = 0.9
    min_keep: int = 1
    sampler_order: tuple[SamplerKind, ...] = SAMPLER_ORDER

    @property
    def is_greedy(self) -> bool:
        """Whether the largest changed logit is the answer, be TEMPERATURE in the order or not."""
        return self.temperature == 0

    @property
    def uses_penalties(self) -> bool:
        """Whether tokens seen before change the draw, other than by DRY."""
        changed = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)
        return changed and self.repetition_window != 0 and SamplerKind.PENALTIES in self.sampler_order

    @property
    def uses_dry(self) -> bool:
        """Whether DRY lowers tokens that would go on with a repetition."""
        return self.dry_multiplier > 0 and self.dry_window != 0 and SamplerKind.DRY in self.sampler_order

    @property
    def uses_xtc(self) -> bool:
        """Whether XTC may remove tokens; llama.cpp takes a threshold above 0.5 as off."""
        return SamplerKind.XTC in self.filters

    @property
    def filters(self) -> tuple[SamplerKind, ...]:
        """The filters that can change anything, in their order."""
        on = {
            SamplerKind.PENALTIES: self.uses_penalties,
            SamplerKind.DRY: self.uses_dry,
            SamplerKind.TOP_N_SIGMA: self.top_n_sigma > 0,
            SamplerKind.TOP_K: self.top_k > 0,
            SamplerKind.TYPICAL_P: self.typical_p < 1,
            SamplerKind.TOP_P: self.top_p < 1,
            SamplerKind.MIN_P: self.min_p > 0,
            SamplerKind.XTC: self.xtc_probability > 0 and self.xtc_threshold <= 0.5,
            SamplerKind.TEMPERATURE: self.temperature != 1 or self.dynamic_temperature_range > 0,
        }
        able = set(SamplerKind)
        if self.is_greedy:
            able = _CHANGING_FILTERS
        elif self.mirostat:
            able = _CHANGING_FILTERS | {SamplerKind.TEMPERATURE}
        return tuple(kind for kind in self.sampler_order if on[kind] and kind in able)

    @property
    def seen_window(self) -> int:
        """How many of the last tokens can change the draw; -1 is all."""
        windows = [self.repetition_window] * self.uses_penalties + [self.dry_window] * self.uses_dry
        return -1 if -1 in windows else max(windows, default=0)

    def violations(
        self, prefix: str = "sampling", limits: InputLimits = DEFAULT_LIMITS
    ) -> list[FieldViolation]:
        """All fields that are out of their limits, as the contract states them."""
        found = []

        def wrong(field: str, text: str) -> None:
            found.append(FieldViolation(f"{prefix}.{field}", text))

        for name, (low, high) in _SAMPLING_RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                wrong(name, f"must be {low} to {high}, is {value}")
        for name, high in {"top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 10.0}.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 < value <= high:
                wrong(name, f"must be above 0 and at most {high:g}, is {value}")
        if len(self.logit_bias) > limits.max_logit_bias:
            wrong("logit_bias", f"at most {limits.max_logit_bias} entries, has {len(self.logit_bias)}")
        for place, (_, bias) in enumerate(self.logit_bias):
            if not math.isfinite(bias) or abs(bias) > 1000:
                wrong(f"logit_bias[{place}].bias", f"must be -1000 to 1000, is {bias}")
        if len(self.dry_sequence_breakers) > MAX_DRY_BREAKERS:
            text = f"at most {MAX_DRY_BREAKERS}, has {len(self.dry_sequence_breakers)}"
            wrong("dry_sequence_breakers", text)
        for place, text in enumerate(self.dry_sequence_breakers):
            size = len(text.encode())
            if not 1 <= size <= MAX_DRY_BREAKER_BYTES or "\0" in text:
                limit = f"must be 1 to {MAX_DRY_BREAKER_BYTES} bytes without a null, is {size}"
                wrong(f"dry_sequence_breakers[{place}]", limit)
        if len(set(self.sampler_order)) < len(self.sampler_order):
            wrong("sampler_order", "names a filter twice")
        if self.mirostat and self.adaptive_p_target is not None:
            wrong("adaptive_p_target", "not together with mirostat")
        if self.mirostat and self.sampler_order != SAMPLER_ORDER:
            wrong("sampler_order", "not together with mirostat")
        return found


# What is left of the chain where the largest logit or mirostat decides.
_CHANGING_FILTERS = {SamplerKind.PENALTIES, SamplerKind.DRY}

_SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "min_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "top_k": (0, 2**31 - 1),
    "repetition_window": (-1, 2**20),
    "seed": (0, MAX_SEED),
    "top_n_sigma": (0, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "dry_allowed_length": (1, 1000),
    "dry_window": (-1, 2**20),
    "dynamic_temperature_range": (0, 100),
    "dynamic_temperature_exponent": (0.01, 100),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 1),
    "adaptive_p_target": (0, 1),
    "adaptive_p_decay": (0, 0.99),
    "min_keep": (1, 1000),
}


class ConstraintKind(enum.Enum):
    """In which language a constraint is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICES = "choices"
    LARK = "lark"
    GBNF = "gbnf"


class Constraint(msgspec.Struct, frozen=True):
    """What a text must look like: `choices` for CHOICES, `text` for the others."""

    kind: ConstraintKind
    text: str = ""
    choices: tuple[str, ...] = ()


class OutputParams(msgspec.Struct, frozen=True):
    """What is told besides text. `top_logprobs` above 0 implies `logprobs`."""

    tokens: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False
    prefill_progress: bool = False
    queue_progress: bool = False

    @property
    def wants_logprobs(self) -> bool:
        """Whether log probabilities are computed."""
        return self.logprobs or self.top_logprobs > 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every prompt position needs its logits."""
        return self.echo and self.wants_logprobs

    @property
    def wants_tokens(self) -> bool:
        """Whether deltas carry tokens."""
        return self.tokens or self.wants_logprobs


class OverflowPolicy(enum.Enum):
    """What happens to a prompt that is too long."""

    ERROR = "error"
    TRUNCATE_LEFT = "truncate_left"
    TRUNCATE_MIDDLE = "truncate_middle"


class Priority(enum.IntEnum):
    """How urgent a request is; the least is served first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


def _about(description: str) -> msgspec.Meta:
    """For the reference of the settings."""
    return msgspec.Meta(description=description)


class GenerationDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's own values for what requests leave unset; None keeps the server's."""

    temperature: Annotated[float | None, _about("divides the logits; 0: the most likely token, always")] = (
        None
    )
    top_k: Annotated[int | None, _about("keeps so many of the most likely tokens; 0: all")] = None
    top_p: Annotated[
        float | None, _about("keeps the most likely tokens of so much probability together; 1: all")
    ] = None
    min_p: Annotated[
        float | None,
        _about("keeps tokens with at least this part of the likeliest one's probability; 0: all"),
    ] = None
    repetition_penalty: Annotated[float | None, _about("divides the logits of tokens seen; 1: off")] = None
    repetition_window: Annotated[
        int | None, _about("how many of the last tokens count as seen; 0: off, -1: the whole context")
    ] = None
    max_tokens: Annotated[int | None, _about("most tokens of an answer")] = None

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


class StopParams(msgspec.Struct, frozen=True):
    """When a generation ends. `max_tokens` None: `default_max_tokens` or what is left."""

    max_tokens: int | None = None
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    sequences: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def violations(self, prefix: str = "stop", limits: InputLimits = DEFAULT_LIMITS) -> list[FieldViolation]:
        """All fields that are out of their limits, as the contract states them."""
        found = []
        most = 2**31 - 1 if self.max_tokens is None else max(0, self.max_tokens)
        if not 0 <= self.min_tokens <= most:
            found.append(FieldViolation(f"{prefix}.min_tokens", f"must be 0 to {most}, is {self.min_tokens}"))
        if self.max_tokens is not None and self.max_tokens < 0:
            found.append(FieldViolation(f"{prefix}.max_tokens", f"must be 0 or more, is {self.max_tokens}"))
        if len(self.sequences) > limits.max_stop_sequences:
            text = f"at most {limits.max_stop_sequences}, has {len(self.sequences)}"
            found.append(FieldViolation(f"{prefix}.sequences", text))
        for place, text in enumerate(self.sequences):
            size = len(text.encode())
            if not 1 <= size <= limits.max_stop_sequence_bytes:
                limit = f"must be 1 to {limits.max_stop_sequence_bytes} bytes, is {size}"
                found.append(FieldViolation(f"{prefix}.sequences[{place}]", limit))
        if len(self.token_ids) > limits.max_stop_tokens:
            text = f"at most {limits.max_stop_tokens}, has {len(self.token_ids)}"
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
