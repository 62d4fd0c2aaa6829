"""The frames between the server and a worker; `framing` tells how they lie on the socket."""

from __future__ import annotations

import logging

import msgspec

from .errors import ErrorRecord
from .input_limits import DEFAULT_LIMITS
from .params import (
    Constraint,
    GenerationInput,
    OutputParams,
    OverflowPolicy,
    Priority,
    SamplingParams,
    StopParams,
)
from .types import (
    CostTable,
    EngineStats,
    FinishReason,
    LoadOptions,
    LoadStage,
    ModelInfo,
    SandboxState,
    StopCause,
    Timings,
    Usage,
)

INITIAL_CREDIT_TOKENS = 256
# What a line of a worker's stderr begins with, by its level: as systemd reads it.
LEVEL_MARKS = {
    logging.DEBUG: "<7>",
    logging.INFO: "<6>",
    logging.WARNING: "<4>",
    logging.ERROR: "<3>",
    logging.CRITICAL: "<2>",
}


class Frame(msgspec.Struct, frozen=True, tag=True):
    """Base of all frames."""


# ---- server to worker -------------------------------------------------------


class Load(Frame, frozen=True):
    """The first frame: which file, and how. `cores` is what the server may use.

    `chat_template` takes the place of the file's own.
    """

    model: str
    path: str
    options: LoadOptions
    cores: int
    stall_timeout_s: float = 30.0
    step_target_s: float = 0.0  # 0: chosen from the measured step times
    share_prefixes: bool = True
    priority_aging_s: float = 10.0
    max_text_job_s: float = DEFAULT_LIMITS.max_text_job_s
    max_rendered_chars: int = DEFAULT_LIMITS.max_rendered_chars
    cost_tables: list[CostTable] = []
    chat_template: str | None = None
    max_waiting_tokens: int = 2**18


class Resume(msgspec.Struct, frozen=True):
    """Where an answer stands that another worker has begun.

    `tokens` are the ids drawn so far, little-endian int32, `text_length` the characters shown of them,
    `echoed` the prompt tokens that were echoed, `state` that of the sampler. Times are CLOCK_MONOTONIC.
    """

    tokens: bytes
    text_length: int
    echoed: int = 0
    state: float | None = None
    admitted_s: float = 0.0
    first_token_s: float = 0.0


class Submit(Frame, frozen=True):
    """A generation of `n` sequences, with ids from `id` on that are unique in the worker's life.

    `received_s` and `deadline_s` (0: none) are CLOCK_MONOTONIC. Prefixes are shared between submits of
    equal `scope`, the engine's time between tenants, and in a tenant between tags. With `resume` it is the
    one answer `index` of a request, which goes on from there. `was_taken`: a worker that is gone had it,
    so the bounds of the queue do not concern it.
    """

    id: int
    input: GenerationInput
    sampling: SamplingParams
    stop: StopParams
    received_s: float
    n: int = 1
    output: OutputParams = OutputParams()
    constraint: Constraint | None = None
    overflow: OverflowPolicy = OverflowPolicy.ERROR
    scope: str = ""
    tenant: str = ""
    tag: str = ""
    priority: Priority = Priority.NORMAL
    credit: int = INITIAL_CREDIT_TOKENS
    deadline_s: float = 0.0
    index: int = 0
    resume: Resume | None = None
    was_taken: bool = False


class Cancel(Frame, frozen=True):
    """Ends a generation, wherever it stands; Ended follows unless it has ended already."""

    id: int


class Credit(Frame, frozen=True):
    """The reader has taken `tokens` tokens more."""

    id: int
    tokens: int


class TextJob(Frame, frozen=True):
    """Work for the text thread: tokenize `input`, or give the text of `token_ids`."""

    id: int
    input: GenerationInput | None = None
    token_ids: list[int] | None = None
    include_pieces: bool = False
    include_special: bool = False


class Share(Frame, frozen=True):
    """How many models are busy on these cores now, this one included."""

    busy_models: int


class Stop(Frame, frozen=True):
    """Ends the worker: everything still running is cancelled."""


class Probe(Frame, frozen=True):
    """For a probe worker: tell the devices, and dry-load `path` if given.

    With `options` the context is made as well, as a load with them on `cores` would.
    """

    path: str | None = None
    options: LoadOptions | None = None
    cores: int = 1


# ---- worker to server -------------------------------------------------------


class Confined(Frame, frozen=True):
    """The first frame: what of the sandbox is in force in this worker.

    `profile` names what is left to it, `landlock_abi` is 0 without Landlock,
    `problem` says why the state is not ON.
    """

    state: SandboxState
    profile: str = ""
    landlock_abi: int = 0
    problem: str = ""


class Progress(Frame, frozen=True):
    """How far the load is; `fraction` is 0 to 1 of this stage."""

    stage: LoadStage
    fraction: float = 0.0


class Ready(Frame, frozen=True):
    """The model is loaded and has run a first step. Bytes are those of all devices together."""

    info: ModelInfo
    options: LoadOptions
    kv_cache_bytes: int
    compute_bytes: int


class Failed(Frame, frozen=True):
    """The load or the probe failed; the worker ends after it."""

    error: ErrorRecord


class Queued(msgspec.Struct, frozen=True, tag=True):
    """A request waits, `position` others before it; never after a Started of it. `id` is its first answer's.

    `estimated_wait_s` is 0 while unknown.
    """

    id: int
    position: int
    estimated_wait_s: float = 0.0


class Started(msgspec.Struct, frozen=True, tag=True):
    """A sequence has been taken up; told once, before anything else of it but Queued."""

    id: int
    prompt_tokens: int
    cached_tokens: int
    max_tokens: int
    truncated_tokens: int = 0


class Prefilled(msgspec.Struct, frozen=True, tag=True):
    """So many prompt tokens are in the KV cache, of `total`."""

    id: int
    done: int
    total: int


class TopToken(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position."""

    id: int
    piece: bytes
    logprob: float


class Token(msgspec.Struct, frozen=True):
    """A token and its bytes; log probabilities of the raw distribution if asked for."""

    id: int
    piece: bytes
    logprob: float | None = None
    top: list[TopToken] = []


class Delta(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Text of a sequence; `count` tokens of its credit are used.

    `ids` are the tokens drawn, `state` the sampler's after them: what `Resume` is made of, as is
    `echoed`, in a delta of the prompt, how many of its tokens have been told.
    """

    id: int
    text: str
    count: int
    tokens: list[Token] = []
    ids: list[int] = []
    state: float | None = None
    echoed: int = 0


class Finished(msgspec.Struct, frozen=True, tag=True):
    """A sequence has ended with a finish reason; the last event of its id.

    `satisfied` tells whether the text is a complete one of its constraint; None without one.
    """

    id: int
    reason: FinishReason
    cause: StopCause | None
    usage: Usage
    timings: Timings
    satisfied: bool | None = None


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A sequence has ended by an error, or by Cancel (`error` None); the last of its id."""

    id: int
    error: ErrorRecord | None = None


SequenceEvent = Queued | Started | Prefilled | Delta | Finished | Ended


class Step(Frame, frozen=True):
    """What one engine step brought, for all its sequences; `stats` None: as before."""

    events: list[SequenceEvent]
    stats: EngineStats | None = None


class TextResult(Frame, frozen=True):
    """The answer to a TextJob; `error` excludes the rest. `ids` are little-endian int32."""

    id: int
    ids: bytes = b""
    pieces: list[bytes] = []
    text: str = ""
    raw: bytes = b""
    error: ErrorRecord | None = None


class Costs(Frame, frozen=True):
    """Step times as they are known now, for the next load."""

    tables: list[CostTable]


class Heartbeat(Frame, frozen=True):
    """The worker lives. `step_age_s` is how long the present step has run, 0 when idle.

    `predicted_s` is how long it was expected to take, 0 where nothing is known.
    """

    step: int
    step_age_s: float
    predicted_s: float = 0.0


class DeviceInfo(msgspec.Struct, frozen=True):
    """A processor of llama.cpp's; `kind` is ggml's: cpu, gpu, igpu, accel."""

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int


class DeviceUse(msgspec.Struct, frozen=True):
    """Bytes that a load takes on one device beside the weights; `device` is llama.cpp's name of it.

    A state of recurrent layers counts as KV cache, the rows of logits as compute.
    """

    device: str
    kv_cache_bytes: int = 0
    compute_bytes: int = 0


class DryRun(msgspec.Struct, frozen=True):
    """What a load would take, as llama.cpp tells it of one without weights.

    `layer_devices` are the devices of all layers, the output last. `moved_tensors`
    counts the tensors that cannot be in the buffer that was wanted for them; None
    where llama.cpp does not tell.
    """

    options: LoadOptions
    devices: list[DeviceUse]
    layer_devices: list[str] = []
    moved_tensors: int | None = None


class ProbeResult(Frame, frozen=True):
    """What a probe worker found; `info` only when a path was asked for, `dry_run` only with options."""

    binding_version: str
    build: str
    devices: list[DeviceInfo]
    info: ModelInfo | None = None
    dry_run: DryRun | None = None


ToWorker = Load | Submit | Cancel | Credit | TextJob | Share | Stop | Probe
ToServer = Confined | Progress | Ready | Failed | Step | TextResult | Costs | Heartbeat | ProbeResult
