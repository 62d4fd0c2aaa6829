"""The measured step times of a model, for `bear show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bear_grpc.cli import output

if TYPE_CHECKING:
    from bear_grpc.v1.types_pb2 import CostTable, Model


def show_costs(model: Model) -> None:
    """A line for each step size, a column for each table; `*` is the one in use."""
    tables = sorted(model.cost_tables, key=lambda table: (table.options, table.threads, table.repack))
    several = len({(table.options, table.threads) for table in tables}) > 1
    times = [{cost.token_count: cost.seconds for cost in table.costs} for table in tables]
    columns = [_title(model, table, with_others=several) for table in tables]
    output.table(
        ("STEP TOKENS", *columns),
        (
            (str(tokens), *(f"{costs[tokens] * 1000:.1f}" if tokens in costs else "" for costs in times))
            for tokens in sorted({tokens for costs in times for tokens in costs})
        ),
        right=("STEP TOKENS", *columns),
    )


def _title(model: Model, table: CostTable, *, with_others: bool) -> str:
    name = "MS REPACKED" if table.repack else "MS PLAIN"
    if with_others:
        name += f", {table.threads} THREAD" + ("S" if table.threads > 1 else "")
        name += f", {table.options}" if table.options else ""
    if not model.status.HasField("effective_options"):
        return name
    options = model.status.effective_options
    may_be = [t for t in model.cost_tables if (t.repack, t.threads) == (options.repack, options.threads)]
    # Of several for other options it cannot be told which one is used.
    return f"{name} *" if may_be == [table] else name
