"""Values that server, worker and engine share: options, parameters, results.

Plain msgspec structs: they travel in frames as they are. Knows no gRPC, no
process and no llama.cpp.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from .errors import FieldViolation, InvalidField

MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ


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
    RESTARTING = "restarting"
    CRASH_LOOP = "crash_loop"
    COOLDOWN = "cooldown"
    PULL_FAILED = "pull_failed"


class PullStage(enum.Enum):
    """What a download is doing."""

    QUEUED = "queued"
    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"


class LoadStage(enum.Enum):
    """What a load is doing."""

    STARTING = "starting"
    WEIGHTS = "weights"
    CONTEXT = "context"
    WARMUP = "warmup"
    MEASURING = "measuring"


class SandboxMode(enum.StrEnum):
    """What a server asks of its workers' sandbox."""

    AUTO = "auto"  # as far as the kernel has it
    REQUIRE = "require"  # no worker without all of it
    OFF = "off"


class SandboxState(enum.Enum):
    """What is in force."""

    OFF = "off"
    PARTIAL = "partial"
    ON = "on"


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
    DEADLINE = "deadline"


def _about(description: str) -> msgspec.Meta:
    """For the reference of the settings."""
    return msgspec.Meta(description=description)


class LoadOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is loaded; None is "not asked for"."""

    context_length: Annotated[
        int | None, _about("most tokens of one sequence, prompt and completion together")
    ] = None
    max_sequences: Annotated[int | None, _about("most sequences that run at the same time")] = None
    kv_cache_tokens: Annotated[int | None, _about("size of the KV cache over all sequences")] = None
    gpu_layers: Annotated[int | None, _about("layers computed on a GPU; -1: all")] = None
    threads: Annotated[int | None, _about("CPU threads of one step")] = None
    batch_tokens: Annotated[int | None, _about("most tokens of one step")] = None
    micro_batch_tokens: Annotated[int | None, _about("tokens of one pass of the kernels")] = None
    kv_cache_type: Annotated[KvCacheType | None, _about("number format of the KV cache")] = None
    flash_attention: Annotated[bool | None, _about("attention uses the fused kernels")] = None
    mmap: Annotated[bool | None, _about("weights are mapped from the file, not read")] = None
    mlock: Annotated[bool | None, _about("weights are locked in memory")] = None
    repack: Annotated[bool | None, _about("weights are rearranged for this CPU")] = None
    kv_unified: Annotated[bool | None, _about("all sequences share one KV pool")] = None
    # Of the model's life, not of its load: the server's own, a worker has no use for them.
    keep_alive_s: Annotated[float | None, _about("after the last use; negative: for ever")] = None
    pinned: Annotated[bool | None, _about("it stays when memory is needed for another model")] = None

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


DEFAULT_CONTEXT_LENGTH = 2048


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
    sampling_s: float = 0.0
    preemptions: int = 0


class StopCause(msgspec.Struct, frozen=True):
    """What ended a generation with STOP; one field is set."""

    eog_token: int | None = None
    sequence: str | None = None
    token_id: int | None = None


class HubSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a repository on the hub; `revision` is a branch, a tag or a commit."""

    repo_id: str
    file: str
    revision: str = "main"


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a model; `sha256` is empty while it is not known."""

    file: str
    sha256: str
    size_bytes: int


class PullProgress(msgspec.Struct, frozen=True):
    """How far a download is, over all files of the model; `remaining_s` 0: unknown."""

    stage: PullStage
    completed_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: float = 0.0
    remaining_s: float = 0.0


class ModelInfo(msgspec.Struct, frozen=True):
    """What a loaded model is, as llama.cpp tells it."""

    description: str
    architecture: str
    vocab_size: int
    context_length_train: int
    parameter_count: int
    weights_bytes: int
    has_chat_template: bool


class StepCost(msgspec.Struct, frozen=True):
    """Seconds that a step of so many tokens takes."""

    tokens: int
    seconds: float


class CostTable(msgspec.Struct, frozen=True):
    """Step times of one model on one machine, ascending by tokens.

    `options` names the load options that were asked for and change them. `costs`
    are as real steps have refined them, `measured` as the first load has found
    them: two tables are only compared by the latter, as work differs.
    """

    repack: bool
    threads: int
    costs: list[StepCost]
    options: str = ""
    measured: list[StepCost] = []


class EngineStats(msgspec.Struct, frozen=True):
    """Counters that only grow, and gauges of this moment.

    `kv_used_tokens` counts tokens in the KV cache, those shared by several
    sequences once; `kv_idle_tokens` of them belong to no running sequence.
    Snapshots are what is kept of ended sequences outside of it. `left_queue` counts sequences that had to
    wait and no longer do, `queue_s` the time in which some had to; `waiting_tokens` are those of prompts
    that wait.
    """

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
    kv_idle_tokens: int = 0
    snapshot_tokens: int = 0
    snapshot_bytes: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    forward_s: float = 0.0
    sampling_s: float = 0.0
    overhead_s: float = 0.0
    left_queue: int = 0
    queue_s: float = 0.0
    waiting_tokens: int = 0


def check(*groups: list[FieldViolation]) -> None:
    """Raises InvalidField naming every violation of all groups; nothing if there is none."""
    found = [violation for group in groups for violation in group]
    if found:
        raise InvalidField.of(found)
