"""Opens a model, with weights rearranged or not: by what was measured on this machine."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable

import msgspec

from ..backend.base import Backend
from ..engine.cost import measure, repacked_is_better
from ..protocol import Frame, Load, Progress
from ..types import CostTable, LoadOptions, LoadStage, StepCost

BackendFactory = Callable[[Load, Callable[[Frame], None]], Backend]

# Besides weights and threads, what changes how long a step takes.
COST_OPTIONS = ("kv_cache_type", "flash_attention", "micro_batch_tokens", "kv_unified", "gpu_layers")


def open_measured(
    load: Load, factory: BackendFactory, post: Callable[[Frame], None]
) -> tuple[Backend, list[CostTable]]:
    """The loaded backend, and step times of this model; measures what is not known yet.

    Raises what the factory raises.
    """
    tables = list(load.cost_tables)
    asked = load.options.repack
    repack = _choice(tables, load) if asked is None else asked
    backend = _open(load, factory, post, repack is not False)
    if backend.options.gpu_layers:
        return backend, tables
    _measure(backend, load, tables, post)
    if repack is None and backend.options.repack is not None:
        if _choice(tables, load) is None:
            backend = _reopen(backend, load, factory, post, False)
            _measure(backend, load, tables, post)
        if _choice(tables, load) is not backend.options.repack:
            backend = _reopen(backend, load, factory, post, not backend.options.repack)
    return backend, tables


def known(tables: list[CostTable], load: Load, options: LoadOptions) -> CostTable | None:
    """The table for a backend that was loaded so, and has these effective options."""
    wanted = (options.repack is True, options.threads or 1, _described(load.options))
    return next((table for table in tables if _key(table) == wanted), None)


def refined(tables: list[CostTable], table: CostTable, costs: list[StepCost]) -> list[CostTable]:
    """The tables, in that one the costs as real steps have shown them."""
    newer = msgspec.structs.replace(table, costs=costs)
    return [newer if _key(other) == _key(table) else other for other in tables]


def _described(asked: LoadOptions) -> str:
    """What changes step times, of what was asked for; equal for equal loads on one machine."""
    values = {name: getattr(asked, name) for name in COST_OPTIONS}
    return " ".join(
        f"{name}={value.value if isinstance(value, enum.Enum) else value}"
        for name, value in values.items()
        if value is not None
    )


def _key(table: CostTable) -> tuple[bool, int, str]:
    return table.repack, table.threads, table.options


def _choice(tables: list[CostTable], load: Load) -> bool | None:
    """Whether repacked weights are better; None while only one kind has been measured."""
    wanted = (load.options.threads or load.cores, _described(load.options))
    by_kind = {table.repack: table.measured for table in tables if (table.threads, table.options) == wanted}
    return repacked_is_better(by_kind[False], by_kind[True]) if len(by_kind) == 2 else None


def _open(load: Load, factory: BackendFactory, post: Callable[[Frame], None], repack: bool) -> Backend:
    options = msgspec.structs.replace(load.options, repack=repack)
    return factory(msgspec.structs.replace(load, options=options), post)


def _reopen(
    backend: Backend, load: Load, factory: BackendFactory, post: Callable[[Frame], None], repack: bool
) -> Backend:
    """One at a time: a model may be as large as the memory."""
    backend.close()
    return _open(load, factory, post, repack)


def _measure(backend: Backend, load: Load, tables: list[CostTable], post: Callable[[Frame], None]) -> None:
    options = backend.options
    if known(tables, load, options) is None:
        post(Progress(LoadStage.MEASURING, 0.0))
        costs = measure(backend, time.monotonic)
        described = _described(load.options)
        tables.append(CostTable(options.repack is True, options.threads or 1, costs, described, costs))
