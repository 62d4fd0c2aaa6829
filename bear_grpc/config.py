"""Typed settings. The only reader of configuration files and of the environment.

Merge order: defaults < file < `BEAR_*` variables < flags.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import platformdirs

from .input_limits import DEFAULT_LIMITS, InputLimits
from .params import GenerationDefaults
from .types import LoadOptions, SandboxMode

log = logging.getLogger(__name__)

DEFAULT_LISTEN = "127.0.0.1:50051"
DEFAULT_WITHDRAWAL_S = 2.0
PREFIX = "BEAR_"
# Variables of the client and of the build, which are no settings of the server.
FOREIGN = frozenset({"BEAR_SERVER", "BEAR_API_KEY", "BEAR_CACHE_DIR", "BEAR_BIN", "BEAR_PYTHON"})


class ConfigError(Exception):
    """The settings are wrong; the message names the setting. Start-up only."""


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one model, over those of the catalog and of its registration."""

    defaults: GenerationDefaults = GenerationDefaults()
    load_options: LoadOptions = LoadOptions()


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of a server. `_s` are seconds."""

    listen: list[str] = msgspec.field(default_factory=lambda: [DEFAULT_LISTEN])
    load: list[str] = []
    models_dir: Path = Path()
    state_dir: Path = Path()  # what is kept over restarts, and the logs
    allow_path: list[Path] = []
    max_waiting_requests: int = 512
    prefix_sharing: Literal["tenant", "all", "off"] = "tenant"
    step_target_ms: float = 0.0  # 0: chosen from the measured step times
    stall_timeout_s: float = 30.0
    heartbeat_timeout_s: float = 10.0
    max_restarts_per_request: int = 3
    priority_aging_s: float = 10.0  # of waiting make a request one priority more urgent; 0: never
    max_request_s: float = 3600.0  # of calls without a deadline of their own; 0: for ever
    stop_grace_s: float = 30.0
    # Between NOT_SERVING and the first call that is refused; None: 2, and 0 where nobody else can connect.
    withdrawal_s: float | None = None
    keepalive_time_s: float = 30.0  # of silence, before a client is asked whether it is there
    keepalive_timeout_s: float = 10.0  # for its answer
    reflection: bool | None = None
    # Models that are needed and not here: "catalog" pulls what the catalog names, "any" also what
    # a request names, "never" only what PullModel asks for.
    auto_pull: Literal["catalog", "any", "never"] = "catalog"
    offline: bool = False
    hub_endpoint: str = "https://huggingface.co"
    hub_token: str = ""
    hub_cache: Path | None = None  # Hugging Face's, whose files are used; unset: where its tools keep it
    max_pulls: int = 2
    pull_rate_limit_mb_s: float = 0.0  # of all downloads together; 0: none
    catalog: Path | None = None  # a TOML file with models of the user's own
    keep_alive_s: float = -1.0  # after a model's last use; negative: for ever
    # Of workers. "auto": as far as the kernel has it; "require": no worker without all of it.
    sandbox: SandboxMode = SandboxMode.AUTO
    log_level: str = "INFO"
    log_format: Literal["auto", "text", "json"] = "auto"  # "auto": text on a terminal, else JSON
    log_file: bool = True  # also to logs/bear.log in state_dir, as JSON unless "text" is set
    log_file_mb: float = 20.0  # then it is rotated
    log_file_count: int = 5  # files that are kept, the present one included
    log_prompts: bool = False  # with a request's line what was asked and answered, cut to 4,096 characters
    metrics_listen: str = ""  # HOST:PORT for Prometheus; empty: no metrics
    limits: InputLimits = DEFAULT_LIMITS
    models: dict[str, ModelConfig] = {}

    def __repr__(self) -> str:
        shown = msgspec.structs.replace(self, hub_token="***" if self.hub_token else "")
        return f"ServerConfig({msgspec.structs.asdict(shown)})"

    def __post_init__(self) -> None:
        if not self.listen:
            raise ConfigError("listen: at least one address is needed")
        for name in ("max_waiting_requests", "stall_timeout_s", "heartbeat_timeout_s", "max_pulls"):
            if not getattr(self, name) > 0:  # false for NaN, too
                raise ConfigError(f"{name}: must be above 0, is {getattr(self, name)}")
        at_least_0 = ("stop_grace_s", "step_target_ms", "pull_rate_limit_mb_s", "max_restarts_per_request")
        for name in (*at_least_0, "priority_aging_s", "max_request_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: must be 0 or more, is {getattr(self, name)}")
        for name in ("keepalive_time_s", "keepalive_timeout_s"):
            if not 0.001 <= getattr(self, name) <= 1e6:  # gRPC takes milliseconds in 32 bits
                raise ConfigError(f"{name}: must be 0.001 to 1000000, is {getattr(self, name)}")
        if self.withdrawal_s is not None and not self.withdrawal_s >= 0:
            raise ConfigError(f"withdrawal_s: must be 0 or more, is {self.withdrawal_s}")
        if not all("!" <= character <= "~" for character in self.hub_token):
            raise ConfigError("hub_token: must be printable ASCII without spaces")
        if not self.hub_endpoint.startswith(("https://", "http://")):
            raise ConfigError(f"hub_endpoint: must begin with https:// or http://, is {self.hub_endpoint!r}")
        if not (self.log_file_mb > 0 and self.log_file_count > 0):
            raise ConfigError("log_file_mb, log_file_count: must be above 0")
        if self.metrics_listen and not re.fullmatch(
            r"(\[[0-9a-fA-F:.]+\]|[^:/\s]+):\d{1,5}", self.metrics_listen
        ):
            raise ConfigError(f"metrics_listen: must be HOST:PORT, is {self.metrics_listen!r}")
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(f"log_level: must be DEBUG, INFO, WARNING or ERROR, is {self.log_level!r}")
        for name, model in self.models.items():
            wrong = model.load_options.violations(f"models.{name}.load_options")
            wrong += model.defaults.violations(f"models.{name}.defaults")
            if wrong:
                raise ConfigError("; ".join(f"{v.field}: {v.description}" for v in wrong))

    @property
    def with_reflection(self) -> bool:
        """Whether reflection is served: as set, else on loopback and unix sockets only."""
        return self.reflection if self.reflection is not None else all(map(is_local, self.listen))

    @property
    def pause_s(self) -> float:
        """The pause of a withdrawal: as set, else none where only this machine can connect."""
        if self.withdrawal_s is not None:
            return self.withdrawal_s
        return 0.0 if all(map(is_local, self.listen)) else DEFAULT_WITHDRAWAL_S


def is_local(address: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def available_cores() -> int:
    """Cores that this process may use: the affinity mask, bounded by a cgroup v2 quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def load_config(
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServerConfig:
    """The settings in force. Flags with value None are not given. Raises ConfigError."""
    values = _from_file(file) if file is not None else {}
    limits = values.get("limits", {})
    values.update(_from_environment(os.environ if environ is None else environ))
    if isinstance(limits, dict) and "limits" in values:
        values["limits"] = limits | values["limits"]
    values.update({name: value for name, value in (flags or {}).items() if value not in (None, [], ())})
    values.setdefault("models_dir", platformdirs.user_data_path("bear-grpc") / "models")
    values.setdefault("state_dir", platformdirs.user_data_path("bear-grpc"))
    values.setdefault("hub_cache", _hub_cache(os.environ if environ is None else environ))
    unknown = [name for name in values if name not in ServerConfig.__struct_fields__]
    if unknown:
        raise ConfigError(_unknown(unknown[0]))
    try:
        return msgspec.convert(values, ServerConfig, strict=False, dec_hook=_decode, str_keys=True)
    except msgspec.ValidationError as exc:
        raise ConfigError(str(exc)) from exc


def _decode(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value).expanduser()
    raise NotImplementedError(kind)


def _hub_cache(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face's own tools keep what they download."""
    if cache := environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home) / "hub"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, ServerConfig.__struct_fields__, n=1)
    return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _from_file(file: Path) -> dict[str, Any]:
    try:
        values = msgspec.toml.decode(file.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{file}: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{file}: {exc}") from exc
    return dict(values)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """`BEAR_*` variables; lists are comma separated. Unknown names are only warned of:
    Kubernetes injects variables such as BEAR_PORT for a service of that name."""
    lists = ("listen", "load", "allow_path")
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or variable in FOREIGN or name in ("models", "limits"):
            continue
        limit = name.removeprefix("limits_")
        if name != limit and limit in InputLimits.__struct_fields__:
            values.setdefault("limits", {})[limit] = text
            continue
        if name not in ServerConfig.__struct_fields__:
            log.warning("%s: %s", variable, _unknown(name))
            continue
        values[name] = [part for part in text.split(",") if part] if name in lists else text
    return values
