"""Numbers by their labels: counters, gauges and histograms, as cheap to count as a dict and a bisect.

No locks: counting and `taken` are of the event loop, and what `taken` gives may go to any thread.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence
from dataclasses import dataclass

Labels = tuple[str, ...]


class Kind(enum.StrEnum):
    """What Prometheus calls it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """What is told of a metric. A counter's name ends in `_total`; `bounds` are a histogram's, ascending."""

    name: str
    kind: Kind
    help: str
    labels: Labels = ()
    bounds: tuple[float, ...] = ()

    @property
    def sample_names(self) -> list[str]:
        """The names that queries may ask for."""
        if self.kind is Kind.HISTOGRAM:
            return [f"{self.name}{suffix}" for suffix in ("_bucket", "_sum", "_count")]
        return [self.name]


@dataclass(frozen=True, slots=True)
class Taken:
    """A metric at one moment. A histogram's value is a tuple: its buckets' counts, then its sum."""

    metric: Metric
    values: Sequence[tuple[Labels, float | tuple[float, ...]]]


class Numbers:
    """A counter or a gauge."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._values: dict[Labels, float] = {}

    def add(self, *labels: str, by: float = 1) -> None:
        """Counts."""
        self._values[labels] = self._values.get(labels, 0) + by

    def forget(self, label: str, value: str) -> None:
        """Drops what is counted with this value of a label."""
        place = self.metric.labels.index(label)
        self._values = {labels: count for labels, count in self._values.items() if labels[place] != value}

    def taken(self) -> Taken:
        """All numbers of this moment."""
        return Taken(self.metric, list(self._values.items()))


class Distribution:
    """One histogram: how many values were at most each bound and above the one before it."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect.bisect_left(self._bounds, value)] += 1
        self.sum += value


class Distributions:
    """A histogram by labels."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._values: dict[Labels, Distribution] = {}

    def of(self, *labels: str) -> Distribution:
        """The one of these labels, to be kept by who counts often."""
        found = self._values.get(labels)
        if found is None:
            found = self._values[labels] = Distribution(self.metric.bounds)
        return found

    def forget(self, label: str, value: str) -> None:
        """Drops what is counted with this value of a label."""
        place = self.metric.labels.index(label)
        self._values = {labels: one for labels, one in self._values.items() if labels[place] != value}

    def taken(self) -> Taken:
        """All numbers of this moment."""
        return Taken(self.metric, [(labels, (*one.counts, one.sum)) for labels, one in self._values.items()])
