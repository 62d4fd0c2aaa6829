"""The bars: one module each, which measures what it needs and gives rows and curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.measure import Plan, Result

# Short ones first; those that load the machine for long last.
_MODULES = (
    "startup", "load", "pull", "cycles", "one_stream", "ttft", "micro", "overhead", "cancel", "two_models",
    "sandbox", "keys", "telemetry", "echo", "fairness", "storm", "stall", "streams", "prefix", "tiles",
    "layouts", "soak",
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A bar's name, what it measures in one sentence, and how it is run."""

    name: str
    title: str
    run: Callable[[Plan], Iterator[Result]]


def all_bars() -> dict[str, Bar]:
    """By name, in the order in which they are run."""
    bars = {}
    for module_name in _MODULES:
        module = import_module(f"benchmarks.bars.{module_name}")
        title = (module.__doc__ or "").split("\n", 1)[0]
        bars[module.NAME] = Bar(module.NAME, title, module.run)
    return bars
