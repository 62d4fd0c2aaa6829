"""Typed settings. The only reader of configuration files and of the environment.

Merge order: defaults < file < `BEAR_*` variables < flags.
"""

from .cores import available_cores
from .settings import EXIT_CONFIG, ConfigError, ModelConfig, ServerConfig
from .sources import Settings, find_file, load_config, read_settings

__all__ = [
    "EXIT_CONFIG",
    "ConfigError",
    "ModelConfig",
    "ServerConfig",
    "Settings",
    "available_cores",
    "find_file",
    "load_config",
    "read_settings",
]
