"""Measured step times on disk, so that a model is measured once on a machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import math
import os
import platform
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from ..store.files import write_whole
from ..types import CostTable, StepCost

log = logging.getLogger(__name__)

BINDING = "llama-cpp-python"
_CPU_INFO = Path("/proc/cpuinfo")


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tables of one model file; the rest tells a person what they are of."""

    path: str
    machine: str
    binding: str
    tables: list[CostTable]


class CostStore:
    """The tables in a folder, one small file for each model. Blocking calls, from one thread at a time
    for each model: not for the event loop's thread.

    A table is of one file, one machine and one release of llama.cpp: when any of
    them changes, it is not found any more.
    """

    def __init__(self, folder: Path, machine: str | None = None) -> None:
        """`machine` is this one unless a test says otherwise."""
        self._folder = folder
        self._machine = machine or describe_machine()
        try:
            self._binding = importlib.metadata.version(BINDING)
        except importlib.metadata.PackageNotFoundError:
            self._binding = ""

    def read(self, model: Path) -> list[CostTable]:
        """What has been measured of a model file; what cannot be read is told in the log."""
        file = self._file(model)
        try:
            tables = msgspec.json.decode(file.read_bytes(), type=Measured).tables if file else []
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError) as exc:
            log.warning("step times in %s are left out: %s", file, exc)
            return []
        if not all(map(is_sound, tables)):
            log.warning("step times in %s are left out: they are no times", file)
            return []
        return tables

    def write(self, model: Path, tables: Sequence[CostTable]) -> None:
        """Keeps tables in place of those there were; a failure is told in the log."""
        file = self._file(model)
        if file is None:
            return
        measured = Measured(str(model), self._machine, self._binding, list(tables))
        try:
            write_whole(file, msgspec.json.format(msgspec.json.encode(measured)))
        except OSError as exc:
            log.warning("step times of %s are not kept: %s", model, exc.strerror)

    def _file(self, model: Path) -> Path | None:
        """Where the tables of a model file are; None if there is no such file."""
        try:
            real = model.resolve()
            stat = real.stat()
        except OSError:
            return None
        identity = (str(real), stat.st_size, stat.st_mtime_ns, self._machine, self._binding)
        key = hashlib.sha256(msgspec.json.encode(identity)).hexdigest()[:32]
        return self._folder / f"{key}.json"


def is_sound(table: CostTable) -> bool:
    """Whether a table has times of ascending step sizes."""
    return table.threads > 0 and _are_sound(table.costs) and _are_sound(table.measured)


def _are_sound(costs: Sequence[StepCost]) -> bool:
    ascending = all(small < large for small, large in pairwise([0, *(cost.tokens for cost in costs)]))
    return ascending and all(math.isfinite(cost.seconds) and cost.seconds > 0 for cost in costs)


def describe_machine() -> str:
    """What step times depend on: kind of machine, processor, number of cores."""
    return f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
