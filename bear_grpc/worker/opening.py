"""Opens a model, with weights rearranged or not: by what was measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from ..backend.base import Backend
from ..engine.cost import measure, repacked_is_better
from ..protocol import Frame, Load, Progress
from ..types import CostTable, LoadOptions, LoadStage

BackendFactory = Callable[[Load, Callable[[Frame], None]], Backend]


def open_measured(
    load: Load, factory: BackendFactory, post: Callable[[Frame], None]
) -> tuple[Backend, list[CostTable]]:
    """The loaded backend, and step times of this model; measures what is not known yet.

    Raises what the factory raises.
    """
    tables = list(load.cost_tables)
    threads = load.options.threads or load.cores
    asked = load.options.repack
    repack = _choice(tables, threads) if asked is None else asked
    backend = _open(load, factory, post, repack is not False)
    if backend.options.gpu_layers:
        return backend, tables
    _measure(backend, tables, post)
    if repack is None and backend.options.repack is not None:
        if _choice(tables, threads) is None:
            backend = _reopen(backend, load, factory, post, False)
            _measure(backend, tables, post)
        if _choice(tables, threads) is not backend.options.repack:
            backend = _reopen(backend, load, factory, post, not backend.options.repack)
    return backend, tables


def known(tables: list[CostTable], options: LoadOptions) -> CostTable | None:
    """The table for a backend with these effective options."""
    wanted = (options.repack is True, options.threads or 1)
    return next((table for table in tables if (table.repack, table.threads) == wanted), None)


def _choice(tables: list[CostTable], threads: int) -> bool | None:
    """Whether repacked weights are better; None while only one kind has been measured."""
    by_kind = {table.repack: table.costs for table in tables if table.threads == threads}
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


def _measure(backend: Backend, tables: list[CostTable], post: Callable[[Frame], None]) -> None:
    options = backend.options
    if known(tables, options) is None:
        post(Progress(LoadStage.MEASURING, 0.0))
        costs = measure(backend, time.monotonic)
        tables.append(CostTable(options.repack is True, options.threads or 1, costs))
