"""One model that the server knows: what it is, and where it stands."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from ..errors import ModelFileInvalid, ModelFileNotFound
from ..executor.executor import ModelExecutor
from ..params import DEFAULT_MAX_TOKENS, GenerationDefaults, SamplingParams
from ..protocol import Ready
from ..types import CostTable, EngineStats, LoadOptions, LoadStage, ModelState, StateReason
from .gguf import GgufError, GgufHeader, read_header

# llama.cpp's metadata keys for sampling values (llama-arch.cpp, LLM_KV_GENERAL_SAMPLING_*).
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
    "repetition_window": "general.sampling.penalty_last_n",
}

# Every transition that exists.
TRANSITIONS: dict[ModelState, frozenset[ModelState]] = {
    ModelState.AVAILABLE: frozenset({ModelState.LOADING, ModelState.ABSENT}),
    ModelState.LOADING: frozenset({ModelState.READY, ModelState.FAILED, ModelState.AVAILABLE}),
    ModelState.READY: frozenset({ModelState.UNLOADING, ModelState.FAILED}),
    ModelState.UNLOADING: frozenset({ModelState.AVAILABLE}),
    ModelState.FAILED: frozenset({ModelState.LOADING, ModelState.ABSENT}),
    ModelState.ABSENT: frozenset({ModelState.LOADING}),
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
    process_bytes: int = 0
    pid: int = 0
    in_flight: int = 0
    stats: EngineStats = dataclasses.field(default_factory=EngineStats)


def header_of(path: Path) -> GgufHeader:
    """The file's header, checked. Blocking. Raises ModelFileNotFound, ModelFileInvalid."""
    try:
        return read_header(path)
    except FileNotFoundError as exc:
        raise ModelFileNotFound(str(path)) from exc
    except GgufError as exc:
        raise ModelFileInvalid(str(path), exc.problem, exc.offset) from exc
    except OSError as exc:
        raise ModelFileInvalid(str(path), f"cannot be read ({exc.strerror})") from exc


@dataclasses.dataclass(slots=True, eq=False)
class ModelEntry:
    """A known model. Event loop only; the manager moves it between states."""

    name: str
    path: Path
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
    ready: Ready | None = None
    load_seconds: float = 0.0
    cost_tables: list[CostTable] = dataclasses.field(default_factory=list)

    def move(self, state: ModelState, reason: StateReason | None = None, message: str = "") -> None:
        """To another state; leaving a state forgets what belonged to it."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"{self.name}: {self.state.name} -> {state.name}")
        self.state, self.reason, self.message, self.since = state, reason, message, _now()
        self.stage, self.fraction = None, 0.0
        if state not in (ModelState.READY, ModelState.UNLOADING):
            self.ready = None
        if state in (ModelState.AVAILABLE, ModelState.FAILED, ModelState.ABSENT):
            self.executor = None

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

    def status(self, *, with_memory: bool = False) -> ModelStatus:
        """The present standing; `with_memory` reads the process's memory, which takes time."""
        executor = self.executor
        return ModelStatus(
            name=self.name,
            state=self.state,
            reason=self.reason,
            message=self.message,
            since=self.since,
            stage=self.stage,
            fraction=self.fraction,
            options=self.ready.options if self.ready else (self.asked if executor else None),
            weights_bytes=self.ready.info.weights_bytes if self.ready else 0,
            kv_cache_bytes=self.ready.kv_cache_bytes if self.ready else 0,
            process_bytes=executor.memory_bytes if executor and with_memory else 0,
            pid=executor.pid if executor else 0,
            in_flight=executor.in_flight if executor else 0,
            stats=executor.stats if executor else EngineStats(),
        )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
