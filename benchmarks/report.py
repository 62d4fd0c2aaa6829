"""Shows the rows: a table for people, JSON for what compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Curve, Row

# A report in a file or a pipe has no terminal to fit into.
WIDTH_WITHOUT_TERMINAL = 150


def show(head: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Prints the report: medians, and the smallest and largest value in brackets."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL)
    for name, text in head.items():
        console.print(f"{name + ':':10} {text}", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("bar", "what", "ours", "peer", "", "ratio", "limit", "ok", "notes"):
        table.add_column(title, no_wrap=title in ("ours", ""))
    for row in rows:
        ratio = row.ratio
        table.add_row(
            row.bar,
            f"{row.what}, {row.unit}" if row.unit else row.what,
            str(row.ours),
            row.peer_name,
            str(row.peer) if row.peer is not None else "",
            f"{ratio:.3f}" if ratio is not None else "",
            row.limit.text if row.limit is not None else "",
            "" if row.limit is None else "yes" if row.limit.holds else "NO",
            row.notes,
        )
    console.print(table)


def write_json(path: Path, head: Mapping[str, str], rows: Sequence[Row], curves: Sequence[Curve]) -> None:
    lines = {"rows": [row.to_json() for row in rows], "curves": [curve.to_json() for curve in curves]}
    content = {**head, **lines}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
