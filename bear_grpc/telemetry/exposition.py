"""Metrics as text, in Prometheus' format and in OpenMetrics'.

Written here and not by a library: of ten models there are thousands of lines, and all of them are
wanted within milliseconds beside a thousand streams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .series import Kind, Labels, Metric, Taken

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def is_open_metrics(accept: str) -> bool:
    """Whether the client takes OpenMetrics; Prometheus asks for it with the highest quality."""
    wanted = {"": 0.0, "application/openmetrics-text": 0.0, "text/plain": 0.0, "*/*": 0.0}
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        if kind in wanted and re.fullmatch(r"[01](\.\d*)?", quality):
            wanted[kind] = max(wanted[kind], float(quality))
    return wanted["application/openmetrics-text"] > max(wanted["text/plain"], wanted["*/*"])


def text_of(page: Iterable[Taken], *, open_metrics: bool = False) -> str:
    """All metrics of a page, also those that have no number yet: their names are known from the start."""
    lines: list[str] = []
    for taken in page:
        metric = taken.metric
        name = metric.name
        if open_metrics and metric.kind is Kind.COUNTER:
            name = name.removesuffix("_total")
        lines += (f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}")
        lines += _samples(taken)
    if open_metrics:
        lines.append("# EOF")
    lines.append("")
    return "\n".join(lines)


def _samples(taken: Taken) -> Iterator[str]:
    metric = taken.metric
    for labels, value in taken.values:
        told = _labels(metric, labels)
        if isinstance(value, tuple):
            yield from _histogram(metric, told, value)
        else:
            yield f"{metric.name}{{{told}}} {value}" if told else f"{metric.name} {value}"


def _histogram(metric: Metric, labels: str, value: tuple[float, ...]) -> Iterator[str]:
    before, count = f"{labels}," if labels else "", 0.0
    for bound, more in zip((*map(str, metric.bounds), "+Inf"), value, strict=False):
        count += more
        yield f'{metric.name}_bucket{{{before}le="{bound}"}} {count}'
    around = f"{{{labels}}}" if labels else ""
    yield f"{metric.name}_count{around} {count}"
    yield f"{metric.name}_sum{around} {value[-1]}"


def _labels(metric: Metric, labels: Labels) -> str:
    # An empty label is one that is not there.
    pairs = zip(metric.labels, labels, strict=True)
    return ",".join(f'{name}="{value.translate(_ESCAPED)}"' for name, value in pairs if value)
