"""Where settings come from, and how they are merged: defaults < file < `BEAR_*` variables < flags."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from .check import convert, unknown
from .fields import PREFIX, all_settings, shape_of
from .lines import lines_of, nearest_line
from .settings import ConfigError, ServerConfig

log = logging.getLogger(__name__)

FILE_VARIABLE = "BEAR_CONFIG"
# Variables of the client and of the build, which are no settings of the server.
FOREIGN = frozenset(
    {
        *("BEAR_SERVER", "BEAR_SERVER_TLS", "BEAR_SERVER_CA", "BEAR_CLIENT_CERTIFICATE", "BEAR_CLIENT_KEY"),
        *(FILE_VARIABLE, "BEAR_API_KEY", "BEAR_CACHE_DIR", "BEAR_BIN", "BEAR_PYTHON"),
    }
)
DEFAULT = "default"
# Flags of `bear serve` that are called otherwise than their settings.
FLAGS = {"tls.certificate": "--tls-cert", "tls.key": "--tls-key", "tls.client_ca": "--tls-client-ca"}


class Settings(msgspec.Struct, frozen=True):
    """The settings in force, and where each was told.

    `origins` are by dotted name: `default`, `FILE:LINE`, the name of a variable, or a flag.
    """

    config: ServerConfig
    origins: dict[str, str]
    file: Path | None = None


def find_file(given: Path | None = None, environ: Mapping[str, str] | None = None) -> Path | None:
    """The file to read: the given one, else that of BEAR_CONFIG, else the user's own if it is there.

    An empty BEAR_CONFIG is none at all. The working folder is not searched: it may be anybody's.
    """
    environ = os.environ if environ is None else environ
    if given is not None:
        return given
    if FILE_VARIABLE in environ:
        named = environ[FILE_VARIABLE]
        return Path(named).expanduser() if named else None
    own = platformdirs.user_config_path("bear-grpc") / "bear.toml"
    # A service often has no home that it may look into.
    return own if os.access(own, os.F_OK) else None


def load_config(
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServerConfig:
    """The settings in force. Flags with value None are not given. Raises ConfigError."""
    return read_settings(file, flags, environ).config


def read_settings(
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    texts: Mapping[str, str] | None = None,
) -> Settings:
    """The settings in force with their origins. Blocking. Raises ConfigError, which tells every problem.

    `flags` are values by dotted name, None for those not given; `texts` are settings as a shell
    writes them (`--set`), which come before all others.
    """
    environ = os.environ if environ is None else environ
    merge = _Merge()
    merge.file(file)
    merge.environment(environ)
    merge.flags(flags or {})
    for name, text in (texts or {}).items():
        merge.text(name, text, "--set")
    if merge.problems:
        raise ConfigError(*merge.problems)
    merge.computed("models_dir", platformdirs.user_data_path("bear-grpc") / "models", DEFAULT)
    merge.computed("state_dir", platformdirs.user_data_path("bear-grpc"), DEFAULT)
    merge.computed("hub_cache", *_hub_cache(environ))
    try:
        config: ServerConfig = msgspec.convert(merge.values, ServerConfig)
    except ConfigError as exc:
        raise ConfigError(*(merge.located(str(problem)) for problem in exc.args)) from exc
    return Settings(config, merge.origins, file)


class _Merge:
    """Values of one source after the other, as nested tables, each checked where it comes from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []

    def file(self, file: Path | None) -> None:
        """Everything that a TOML file holds."""
        if file is None:
            return
        try:
            text = file.read_text(encoding="utf-8")
            values = msgspec.toml.decode(text)
        except OSError as exc:
            raise ConfigError(f"{file}: {exc.strerror}") from exc
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{file}: {exc}") from exc
        lines = lines_of(text)

        def where(name: str) -> str:
            line = nearest_line(lines, name)
            return f"{file}:{line}" if line else str(file)

        checked = convert(values, ServerConfig, where, self.problems)
        self.values = checked.value
        self.origins = {name: where(name) for name in checked.names}

    def environment(self, environ: Mapping[str, str]) -> None:
        """`BEAR_*` variables; empty ones are not given. Unknown ones are only warned of:
        Kubernetes injects variables such as BEAR_PORT for a service of that name."""
        known = {setting.variable: name for name, setting in all_settings().items() if setting.variable}
        for variable, text in environ.items():
            if not variable.startswith(PREFIX) or variable in FOREIGN or not text:
                continue
            if variable in known:
                self.text(known[variable], text, variable)
            else:
                log.warning("%s: %s", variable, unknown(variable.removeprefix(PREFIX).lower()))

    def flags(self, flags: Mapping[str, object]) -> None:
        """Values that the command line has parsed."""
        for name, value in flags.items():
            if value in (None, [], ()):
                continue
            self._take(name, value, FLAGS.get(name, f"--{name.replace('_', '-')}"), is_text=False)

    def text(self, name: str, text: str, where: str) -> None:
        """A value as an environment or a shell writes it; lists are comma separated."""
        setting = all_settings().get(name)
        is_list = setting is not None and shape_of(setting.kind).is_list
        self._take(name, [part for part in text.split(",") if part] if is_list else text, where, is_text=True)

    def _take(self, name: str, value: object, where: str, *, is_text: bool) -> None:
        setting = all_settings().get(name)
        if setting is None or not setting.variable:
            self.problems.append(f"{where}: {unknown(name)}")
            return
        checked = convert(value, setting.kind, lambda _: where, self.problems, name=name, is_text=is_text)
        self._put(name, checked.value, where)

    def computed(self, name: str, value: object, where: str) -> None:
        """A default that depends on the machine."""
        if name not in self.values:
            self._put(name, value, where)

    def located(self, problem: str) -> str:
        """A problem that begins with a setting's name, with where that was told before it."""
        origin = self.origins.get(problem.partition(":")[0], DEFAULT)
        return problem if origin == DEFAULT else f"{origin}: {problem}"

    def _put(self, name: str, value: Any, where: str) -> None:
        *tables, last = name.split(".")
        values = self.values
        for table in tables:
            values = values.setdefault(table, {})
        values[last] = value
        self.origins[name] = where


def _hub_cache(environ: Mapping[str, str]) -> tuple[Path, str]:
    """Where Hugging Face's own tools keep what they download, and which variable says so."""
    if cache := environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser(), "HF_HUB_CACHE"
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub", "HF_HOME"
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub", DEFAULT
