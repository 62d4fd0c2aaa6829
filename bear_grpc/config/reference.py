"""The page of all settings, made from their types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import msgspec

from .effective import as_toml, toml_value
from .fields import Setting, all_settings

_HEAD = """\
# Settings

<!-- Made by `python -m tools.configuration` from bear_grpc/config; a test compares them. -->

A setting is told by a flag of `bear serve`, else by a `BEAR_*` variable, else by a file, else it has its
default.

- **File**: TOML. The one of `--config FILE`, else of the variable `BEAR_CONFIG` (empty: none), else
  `bear.toml` in the user's configuration folder (Linux: `~/.config/bear-grpc/bear.toml`). The working
  folder is not searched: it may be anybody's. An unknown name in it is an error that tells the nearest one.
  Values have the type of the table below: `"5"` is no number.
- **Variables**: those of the table below; a list is separated by commas. An empty variable is not given. An
  unknown `BEAR_*` variable is a warning, no error: Kubernetes makes such variables for a service called
  `bear`.
- **Flags**: some settings have one of their own, and `--set NAME=VALUE`, repeatable, sets any that has a
  variable: `--set limits.max_answers=4`. A value is written as in a variable.
- `bear config` prints the settings in force and where each was told; secrets are masked. `bear config
  --check FILE` tells every problem of a file, and exits 78 if there is one.
- **Reload**: at SIGHUP (`kill -HUP`, `systemctl reload`) a running server reads all of this again, with the
  variables and flags that it was started with. Settings with *yes* under "reloads" are taken over, and so
  are the files that they name; the log tells which have changed, and which need a restart. If anything is
  wrong, the log tells it and everything stays as it was.

Names end with their unit: `_s` are seconds, `_bytes` bytes."""
_COLUMNS = ("setting", "type", "default", "variable", "flag", "reloads", "")


def reference(flags: Mapping[str, str]) -> str:
    """The page in Markdown. `flags` are those of `bear serve`, by the names of their settings."""
    parts = [_HEAD]
    tables = [*dict.fromkeys(["", *(setting.table for setting in all_settings().values())])]
    ordered = sorted(all_settings().values(), key=lambda setting: tables.index(setting.table))
    for table, settings in groupby(ordered, lambda setting: setting.table):
        rows = [_row(setting, flags) for setting in settings]
        used = [place for place in range(len(_COLUMNS)) if any(row[place] for row in rows)]
        parts += [
            f"\n## `[{table}]`\n" if table else "\n## Outside of tables\n",
            *(_cells(row[place] for place in used) for row in [_COLUMNS, ("---",) * len(_COLUMNS), *rows]),
        ]
    return "\n".join(parts) + "\n"


def _row(setting: Setting, flags: Mapping[str, str]) -> tuple[str, ...]:
    return (
        f"`{setting.name.rpartition('.')[2]}`",
        setting.type_name,
        setting.told_default or _default(setting.default),
        f"`{setting.variable}`" if setting.variable else "",
        f"`{flags[setting.name]}`" if setting.name in flags else "",
        "yes" if setting.reloads else "",
        setting.description + (" (secret)" if setting.is_secret else ""),
    )


def _default(value: Any) -> str:
    if value is msgspec.NODEFAULT:
        return "is required"
    if value in (None, "", []):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"`{toml_value(as_toml(value))}`"


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
