"""One model that the server knows: what it is, and where it stands."""

from __future__ import annotations

import dataclasses
import datetime
import errno
from pathlib import Path
from typing import Any

import msgspec

from ..errors import EngineStartFailed, ModelFileInvalid, ModelFileNotFound
from ..executor.executor import ModelExecutor
from ..executor.process import WorkerProcess
from ..params import DEFAULT_MAX_TOKENS, GenerationDefaults, SamplingParams
from ..protocol import Ready
from ..types import (
    CostTable,
    EngineStats,
    HubSource,
    LoadOptions,
    LoadStage,
    ModelFile,
    ModelState,
    PullProgress,
    StateReason,
)
from .gguf import GgufError, GgufHeader, read_header
from .gguf_parts import parts_of, read_headers
from .transitions import WITH_EXECUTOR, WITH_READY, check_transition

# Errors of a system call that tell of this process or machine, and nothing of the file.
_OWN_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# llama.cpp's metadata keys for sampling values (llama-arch.cpp, LLM_KV_GENERAL_SAMPLING_*).
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
    "repetition_window": "general.sampling.penalty_last_n",
}


@dataclasses.dataclass(slots=True, frozen=True)
class ModelStatus:
    """A model's standing at one moment; what the contract's ModelStatus tells."""

    name: str
    state: ModelState
    reason: StateReason | None
    message: str
    since: datetime.datetime
    stage: LoadStage | None = None
    fraction: float = 0.0
    options: LoadOptions | None = None
    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    compute_bytes: int = 0
    process_bytes: int = 0
    pid: int = 0
    in_flight: int = 0
    stats: EngineStats = dataclasses.field(default_factory=EngineStats)
    pull: PullProgress | None = None
    expires: datetime.datetime | None = None
    is_known: bool = True  # False: the last word of a model that has been forgotten

    @property
    def is_loaded(self) -> bool:
        """Whether it is known what its worker has taken."""
        return self.weights_bytes > 0

    def is_step_after(self, before: ModelStatus) -> bool:
        """Whether nothing but progress and numbers has changed since `before`, of the same model."""
        return (self.state, self.reason, self.since, self.is_known) == (
            before.state,
            before.reason,
            before.since,
            before.is_known,
        )


def header_of(path: Path) -> GgufHeader:
    """A model's header, checked; of all its files if it is split. Blocking.

    Raises ModelFileNotFound, ModelFileInvalid, and EngineStartFailed where it is not the file's fault.
    """
    try:
        header = read_header(path)
        return header if header.split_count == 1 else read_headers(parts_of(path, header.split_count))
    except FileNotFoundError as exc:
        raise ModelFileNotFound(str(path)) from exc
    except GgufError as exc:
        raise ModelFileInvalid(str(path), exc.problem, exc.offset) from exc
    except OSError as exc:
        if exc.errno in _OWN_TROUBLE:
            raise EngineStartFailed(f"{path} could not be opened ({exc.strerror})") from exc
        raise ModelFileInvalid(str(path), f"cannot be read ({exc.strerror})") from exc


@dataclasses.dataclass(slots=True, eq=False)
class ModelEntry:
    """A known model. Event loop only; the manager and the shelf move it between states.

    `path` is None while its file is not here. `keep_alive_s` and `pinned` are
    those in force: of the last load, or what the next one will have. `left` are
    workers of earlier loads that not even SIGKILL has ended.
    """

    name: str
    path: Path | None
    is_embedded: bool
    description: str = ""
    aliases: tuple[str, ...] = ()
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    load_options: LoadOptions = dataclasses.field(default_factory=LoadOptions)
    sha256: str = ""
    size_bytes: int = 0
    header: GgufHeader | None = None
    state: ModelState = ModelState.AVAILABLE
    reason: StateReason | None = None
    message: str = ""
    since: datetime.datetime = dataclasses.field(default_factory=lambda: _now())
    stage: LoadStage | None = None
    fraction: float = 0.0
    asked: LoadOptions = dataclasses.field(default_factory=LoadOptions)
    executor: ModelExecutor | None = None
    left: tuple[WorkerProcess, ...] = ()
    ready: Ready | None = None
    load_seconds: float = 0.0
    cost_tables: list[CostTable] = dataclasses.field(default_factory=list)
    source: HubSource | None = None
    files: tuple[ModelFile, ...] = ()
    is_listed: bool = False  # in a catalog
    expected_sha256: str = ""  # as its catalog tells it
    chat_template: str | None = None  # in place of the file's own
    license: str = ""
    gpu_note: str = ""
    pull: PullProgress | None = None
    keep_alive_s: float = -1.0
    pinned: bool = False
    expires: datetime.datetime | None = None

    def move(self, state: ModelState, reason: StateReason | None = None, message: str = "") -> None:
        """To another state; leaving a state forgets what belonged to it."""
        check_transition(self.name, self.state, state)
        self.state, self.reason, self.message, self.since = state, reason, message, _now()
        self.stage, self.fraction = None, 0.0
        if state is not ModelState.READY:
            self.expires = None
        if state not in WITH_READY:
            self.ready = None
        if state not in WITH_EXECUTOR:
            self.left, self.executor = self._left_now(), None

    @property
    def is_ready(self) -> bool:
        """Whether it is loaded and takes requests."""
        return self.state is ModelState.READY

    @property
    def is_in_use(self) -> bool:
        """Whether it is loaded, loading or unloading: its file must stay."""
        return self.state in WITH_EXECUTOR

    @property
    def file(self) -> Path:
        """Where its file is. Raises ModelFileNotFound while it is not here."""
        self.check_file()
        assert self.path is not None
        return self.path

    def check_file(self) -> None:
        """Raises ModelFileNotFound for a model that has not been downloaded."""
        if self.path is None:
            raise ModelFileNotFound.of(self.name, f"`bear pull {self.name}` fetches it")

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered, by its catalog's template or the file's."""
        return self.chat_template is not None or (self.header is not None and self.header.has_chat_template)

    def sampling(self, seed: int) -> SamplingParams:
        """The model's configured values over those of its file, over the server's."""
        values = self._sampling_of_file()
        for name in SAMPLING_KEYS:
            configured = getattr(self.defaults, name)
            if configured is not None:
                values[name] = configured
        return SamplingParams(seed=seed, **values)

    def _sampling_of_file(self) -> dict[str, Any]:
        """What the file's metadata recommends; values out of their limits do not count."""
        found: dict[str, Any] = {}
        for name, key in SAMPLING_KEYS.items():
            value: Any = self.header.metadata.get(key) if self.header is not None else None
            kinds = int if name in ("top_k", "repetition_window") else (int, float)
            if isinstance(value, kinds) and not isinstance(value, bool):
                values: dict[str, Any] = {name: value}
                if not SamplingParams(**values).violations():
                    found.update(values)
        return found

    @property
    def max_tokens(self) -> int:
        """What a request that names no max_tokens gets at most."""
        return self.defaults.max_tokens if self.defaults.max_tokens is not None else DEFAULT_MAX_TOKENS

    def status(self, *, process_bytes: int | None = None) -> ModelStatus:
        """The present standing; `process_bytes` are what the executor's process was found to hold.

        What is left of processes that do not end is added to it, or told once there is no other.
        """
        executor, left = self.executor, self._left_now()
        held = process_bytes or 0
        if process_bytes is not None or executor is None:
            held += sum(process.left_bytes() for process in left)
        return ModelStatus(
            name=self.name,
            state=self.state,
            reason=self.reason,
            message=self.message,
            since=self.since,
            stage=self.stage,
            fraction=self.fraction,
            options=self._effective_options(),
            weights_bytes=self.ready.info.weights_bytes if self.ready else 0,
            kv_cache_bytes=self.ready.kv_cache_bytes if self.ready else 0,
            compute_bytes=self.ready.compute_bytes if self.ready else 0,
            process_bytes=held,
            pid=executor.pid if executor else (left[0].pid if left else 0),
            in_flight=executor.in_flight if executor else 0,
            stats=executor.stats if executor else EngineStats(),
            pull=self.pull,
            expires=self.expires,
        )

    def _left_now(self) -> tuple[WorkerProcess, ...]:
        left = tuple(process for process in self.left if not process.has_ended)
        return left if self.executor is None else (*left, *self.executor.left)

    def _effective_options(self) -> LoadOptions | None:
        """What the worker has chosen, else what is asked of it; with the model's own life."""
        if self.executor is None:
            return None
        options = self.ready.options if self.ready else self.asked
        return msgspec.structs.replace(options, keep_alive_s=self.keep_alive_s, pinned=self.pinned)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
