"""Figures: a series of measurements, and a row that holds ours against the peer's and judges it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.others import QUIET_CORES, Others, wait_until_quiet

ATTEMPTS = 4
QUICK_MODEL = "small"

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """One quantity, measured once or more."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return number(self.values[0])
        return f"{number(self.median)} ({number(min(self.values))} to {number(max(self.values))})"


@dataclass(frozen=True)
class Limit:
    """What is asked of a row, in words, and whether it holds."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Row:
    """One line of the report. `peer` is what `ours` is held against, if anything."""

    bar: str
    what: str
    unit: str
    ours: Series
    peer_name: str = ""
    peer: Series | None = None
    limit: Limit | None = None
    notes: str = ""

    @property
    def ratio(self) -> float | None:
        """Median by median."""
        return self.ours.median / self.peer.median if self.peer is not None and self.peer.median else None

    def to_json(self) -> dict[str, Any]:
        return {
            "bar": self.bar,
            "what": self.what,
            "unit": self.unit,
            "ours": _summary(self.ours),
            "peer_name": self.peer_name or None,
            "peer": _summary(self.peer) if self.peer is not None else None,
            "ratio": self.ratio,
            "limit": self.limit.text if self.limit is not None else None,
            "ok": self.limit.holds if self.limit is not None else None,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Curve:
    """One line, or one cloud of points, of a picture that a bar draws. `pictures` knows the pictures."""

    picture: str
    name: str
    points: Sequence[tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "picture": self.picture,
            "name": self.name,
            "points": [[round(x, 4), round(y, 4)] for x, y in self.points],
        }


Result = Row | Curve


@dataclass
class Plan:
    """How much is measured, as asked for on the command line; and how quiet the machine was meanwhile.

    `at_once`: without waiting for quiet, and once, however busy the machine is.
    """

    quick: bool = False
    rounds: int | None = None
    at_once: bool = False
    repeated: int = 0
    others: float = 0.0

    def count(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def model(self, full: str) -> str:
        """The model to measure with: a small one if it is to be quick."""
        return QUICK_MODEL if self.quick else full

    def rounds_of(self, full: int, quick: int = 1) -> int:
        return self.rounds or self.count(full, quick)

    def settle(self) -> None:
        """Waits until the machine is quiet, for what is not repeated: a load at which a server measures."""
        if not (self.quick or self.at_once):
            wait_until_quiet()

    def undisturbed(self, measure: Callable[[], T]) -> T:
        """Measures when the machine is quiet, and again if it was not quiet until the end.

        After some attempts the quietest is taken; the report tells how quiet that was.
        """
        attempts: list[tuple[float, T]] = []
        for _ in range(1 if self.quick or self.at_once else ATTEMPTS):
            self.settle()
            watch = Others()
            value = measure()
            attempts.append((watch.cores(), value))
            if attempts[-1][0] <= QUIET_CORES:
                break
        self.repeated += len(attempts) - 1
        others, value = min(attempts, key=lambda attempt: attempt[0])
        self.others = max(self.others, others)
        return value


def at_least(ours: Series, peer: Series, ratio: float) -> Limit:
    return Limit(f"≥ {ratio:g} x", ours.median >= ratio * peer.median)


def at_most_of(ours: Series, peer: Series, ratio: float) -> Limit:
    """No more than a part of the peer's, median by median."""
    return Limit(f"≤ {ratio:g} x", ours.median <= ratio * peer.median)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of the values do not exceed (nearest rank)."""
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def at_most(ours: Series, value: float, text: str | None = None) -> Limit:
    """No more than `value`, at the median; `text` says where the value comes from."""
    return Limit(text or f"≤ {number(value)}", ours.median <= value)


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _summary(series: Series) -> dict[str, Any]:
    values = list(series.values)
    return {"median": series.median, "min": min(values), "max": max(values), "values": values}
