"""The settings: what each is called, what it is, what it means, and whether it reloads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..access.certificates import Identity
from ..input_limits import DEFAULT_LIMITS, InputLimits
from ..params import GenerationDefaults
from ..transport import DEFAULT_SOCKET_MODE, Listener, Tls, listeners_of, problems
from ..types import LoadOptions, SandboxMode

DEFAULT_LISTEN = "127.0.0.1:50051"
DEFAULT_WITHDRAWAL_S = 2.0
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h


def about(
    description: str, *, reloads: bool = False, secret: bool = False, default: str = ""
) -> msgspec.Meta:
    """What the reference says of a setting, in Markdown.

    `reloads`: a running server takes its new value at SIGHUP. `secret`: it is never shown. `default` is
    told in place of a default that depends on the machine.
    """
    return msgspec.Meta(
        description=description, extra={"reloads": reloads, "secret": secret, "default": default}
    )


class ConfigError(Exception):
    """The settings are wrong. Each of `args` is one problem and names the setting."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one model, over those of the catalog and of its registration."""

    defaults: GenerationDefaults = GenerationDefaults()
    load_options: LoadOptions = LoadOptions()


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of a server. `_s` are seconds."""

    listen: Annotated[list[str], about("`HOST:PORT` or `unix:PATH`")] = msgspec.field(
        default_factory=lambda: [DEFAULT_LISTEN]
    )
    listeners: Annotated[
        list[Listener],
        about(
            "further addresses, each with its own security and services "
            "([listeners](security.md#several-listeners))"
        ),
    ] = []
    socket_mode: Annotated[str, about("of the files of unix sockets")] = DEFAULT_SOCKET_MODE
    insecure_public: Annotated[
        bool,
        about(
            "serves other machines even without TLS, or without asking who they are "
            "([transport](security.md#transport))"
        ),
    ] = False
    tls: Tls = Tls()
    identities: Annotated[
        dict[str, Identity],
        about(
            "what the names in client certificates may do, by patterns of them "
            "([client certificates](security.md#client-certificates))",
            reloads=True,
        ),
    ] = {}
    load: Annotated[list[str], about("models to load before the server reports SERVING")] = []
    models_dir: Annotated[
        Path,
        about(
            "downloads, registrations, step times; models in it may be registered",
            default="`models` in the user's data folder",
        ),
    ] = Path()
    state_dir: Annotated[
        Path,
        about(
            "API keys, logs, usage, and what else the server has to remember besides models",
            default="the user's data folder",
        ),
    ] = Path()
    auth: Annotated[
        Literal["off", "keys"],
        about("`keys`: nobody calls without an [API key](security.md#api-keys) or a known certificate"),
    ] = "off"
    allow_path: Annotated[list[Path], about("further folders to register models from", reloads=True)] = []
    max_waiting_requests: Annotated[
        int, about("requests that may wait for one model; more get `QUEUE_FULL`", reloads=True)
    ] = 512
    max_waiting_tokens: Annotated[
        int, about("tokens of the prompts that wait for one model; more get `QUEUE_FULL`")
    ] = 2**18  # as many requests of 512 tokens each
    prefix_sharing: Annotated[
        Literal["tenant", "all", "off"],
        about("whose requests share prefixes in the KV cache: those of one `tenant`, `all`, or `off`"),
    ] = "tenant"
    step_target_ms: Annotated[
        float, about("longest step while text streams; 0: chosen from the measured step times")
    ] = 0.0
    stall_timeout_s: Annotated[float, about("a stream not read for so long ends `SLOW_CONSUMER`")] = 30.0
    heartbeat_timeout_s: Annotated[
        float, about("a worker that gives no sign of life for so long is replaced")
    ] = 10.0
    max_restarts_per_request: Annotated[
        int, about("how often a request goes on in a new worker; then `WORKER_CRASHED`")
    ] = 3
    priority_aging_s: Annotated[
        float,
        about(
            "so long a wait makes a request one priority more urgent; 0: never "
            "([who is next](engine.md#who-is-next))"
        ),
    ] = 10.0
    max_request_s: Annotated[
        float,
        about(
            "how long a call without a deadline may take; 0: for ever ([deadlines](engine.md#deadlines))",
            reloads=True,
        ),
    ] = 3600.0
    stop_grace_s: Annotated[
        float,
        about("how long streams may go on after SIGTERM, `withdrawal_s` included", reloads=True),
    ] = 30.0
    withdrawal_s: Annotated[
        float | None,
        about(
            "pause between NOT_SERVING and the first call that is refused "
            "([stopping](lifecycle.md#stopping))",
            reloads=True,
            default="2; 0 if it listens on loopback and unix sockets only",
        ),
    ] = None
    keepalive_time_s: Annotated[float, about("of silence, before a client is asked whether it is there")] = (
        30.0
    )
    keepalive_timeout_s: Annotated[float, about("for its answer; a client without one is gone")] = 10.0
    reflection: Annotated[
        bool | None,
        about(
            "whether reflection is served",
            default="if it listens on loopback and unix sockets only",
        ),
    ] = None
    auto_pull: Annotated[
        Literal["catalog", "any", "never"],
        about(
            "which models that are needed and not here are downloaded: those of the `catalog`, `any`, "
            "or `never` without a PullModel",
            reloads=True,
        ),
    ] = "catalog"
    offline: Annotated[bool, about("the hub is never asked", reloads=True)] = False
    hub_endpoint: Annotated[str, about("which hub; never a field of a request", reloads=True)] = (
        "https://huggingface.co"
    )
    hub_token: Annotated[str, about("the token for the hub", reloads=True, secret=True)] = ""
    hub_cache: Annotated[
        Path | None,
        about(
            "files that are there already are verified and linked, not downloaded again",
            default="Hugging Face's own",
        ),
    ] = None
    max_pulls: Annotated[int, about("downloads at once; others wait")] = 2
    pull_rate_limit_mb_s: Annotated[float, about("of all downloads together; 0: none", reloads=True)] = 0.0
    catalog: Annotated[
        Path | None,
        about(
            "a TOML file with `[[model]]` entries of your own, as in "
            "[catalog.toml](../bear_grpc/models/catalog.toml)",
            reloads=True,
        ),
    ] = None
    keep_alive_s: Annotated[
        float,
        about(
            "how long a model stays after its last use, where neither request nor model say; "
            "negative: for ever",
            reloads=True,
        ),
    ] = -1.0
    sandbox: Annotated[
        SandboxMode,
        about("of workers: as far as the kernel has it; `require`: no worker without all of it; `off`"),
    ] = SandboxMode.AUTO
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], about("the least that is logged", reloads=True)
    ] = "INFO"
    log_format: Annotated[
        Literal["auto", "text", "json"],
        about("of stderr: `auto` is text on a terminal, else JSON ([logs](operations.md#logs))"),
    ] = "auto"
    log_file: Annotated[
        bool, about("also to `logs/bear.log` in `state_dir`, as JSON unless `log_format` is `text`")
    ] = True
    log_file_mb: Annotated[float, about("its size; then it is rotated")] = 20.0
    log_file_count: Annotated[int, about("files that are kept, the present one included")] = 5
    log_prompts: Annotated[
        bool, about("with a request's line what was asked and answered, cut to 4,096 characters")
    ] = False
    usage_days: Annotated[
        int,
        about(
            "how long it is remembered what every key used of every model "
            "([quotas and usage](security.md#quotas-and-usage))"
        ),
    ] = 400
    metrics_listen: Annotated[
        str, about("`HOST:PORT` for Prometheus ([metrics](operations.md#metrics))", default="no metrics")
    ] = ""
    otlp_endpoint: Annotated[
        str,
        about(
            "of an OpenTelemetry collector that takes traces over gRPC, such as `http://127.0.0.1:4317` "
            "([traces](operations.md#traces))",
            default="none",
        ),
    ] = ""
    trace_sample_ratio: Annotated[float, about("of the calls that belong to no trace yet")] = 1.0
    limits: InputLimits = DEFAULT_LIMITS
    models: dict[str, ModelConfig] = {}

    def __repr__(self) -> str:
        return _shown(self)

    def __post_init__(self) -> None:
        asks = self.auth != "off"
        for problem in problems(
            self.all_listeners, self.tls, keys_are_asked=asks, insecure_public=self.insecure_public
        ):
            raise ConfigError(problem)
        if self.identities and not asks:
            raise ConfigError("identities: what they may do is asked with auth = 'keys' only")
        at_least_1 = ("max_waiting_requests", "max_waiting_tokens", "max_pulls", "usage_days")
        for name in (*at_least_1, "stall_timeout_s", "heartbeat_timeout_s"):
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
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("https://", "http://")):
            raise ConfigError(
                f"otlp_endpoint: must begin with https:// or http://, is {self.otlp_endpoint!r}"
            )
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ConfigError(f"trace_sample_ratio: must be 0 to 1, is {self.trace_sample_ratio}")
        for name, model in self.models.items():
            wrong = model.load_options.violations(f"models.{name}.load_options")
            wrong += model.defaults.violations(f"models.{name}.defaults")
            if wrong:
                raise ConfigError(*(f"{v.field}: {v.description}" for v in wrong))

    @property
    def all_listeners(self) -> list[Listener]:
        """Those of `listen` and of `listeners`, in full."""
        return listeners_of(self.listen, self.listeners, self.tls, self.socket_mode)

    @property
    def with_reflection(self) -> bool:
        """Whether reflection is served: as set, else on loopback and unix sockets only."""
        if self.reflection is not None:
            return self.reflection
        return all(listener.is_local for listener in self.all_listeners if listener.serves == "all")

    @property
    def pause_s(self) -> float:
        """The pause of a withdrawal: as set, else none where only this machine can connect."""
        if self.withdrawal_s is not None:
            return self.withdrawal_s
        return 0.0 if all(listener.is_local for listener in self.all_listeners) else DEFAULT_WITHDRAWAL_S


def _shown(struct: msgspec.Struct) -> str:
    """A table with its secrets masked."""
    parts = []
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        metas = getattr(field.type, "__metadata__", ())
        is_secret = any((meta.extra or {}).get("secret") for meta in metas)
        shown = _shown(value) if isinstance(value, msgspec.Struct) else repr(value)
        parts.append(f"{field.name}={repr('***') if value and is_secret else shown}")
    return f"{type(struct).__name__}({', '.join(parts)})"
