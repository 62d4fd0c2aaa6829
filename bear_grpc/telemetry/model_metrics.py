"""Models, their engines and their memory, read when somebody asks for the metrics."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator

from ..errors import BearError
from ..models.entry import ModelEntry, ModelStatus
from ..models.memory import plan
from ..models.shelf import Shelf
from ..models.weights import HOST
from ..protocol import DeviceInfo, Ready
from ..types import ModelState, StateReason
from . import families
from .series import Labels, Metric, Numbers, Taken

Value = tuple[Metric, Labels, float]
OUTCOMES = {ModelState.READY: "ready", ModelState.FAILED: "failed"}


class ModelMetrics:
    """Event loop only."""

    def __init__(self, shelf: Shelf, *, cores: int, on_forgotten: Callable[[str], None]) -> None:
        """`on_forgotten` gets the name of a model that is known no more."""
        self._shelf = shelf
        self._cores = cores
        self._on_forgotten = on_forgotten
        self._restarts = Numbers(families.RESTARTS)
        self._loads = Numbers(families.LOADS)
        # Since when each model is in its state, so that steps of progress count once.
        self._since: dict[str, tuple[ModelState, datetime.datetime]] = {}
        self._plans: dict[str, tuple[Ready, dict[str, int]]] = {}
        shelf.feed.listen(self._take)

    def taken(self) -> list[Taken]:
        """All numbers of this moment."""
        counts = dict.fromkeys(ModelState, 0)
        values: list[Value] = []
        for entry in self._shelf.list():
            counts[entry.state] += 1
            if entry.executor is not None or entry.pull is not None:
                values += self._of(entry)
        values += [(families.MODELS, (state.value,), count) for state, count in counts.items()]
        return [self._restarts.taken(), self._loads.taken(), *grouped(values, _OF_MODELS)]

    def _take(self, status: ModelStatus) -> None:
        if not status.is_known:
            self._since.pop(status.name, None)
            self._plans.pop(status.name, None)
            self._restarts.forget("model", status.name)
            self._loads.forget("model", status.name)
            self._on_forgotten(status.name)
            return
        now = (status.state, status.since)
        if self._since.get(status.name) == now:
            return
        before, self._since[status.name] = self._since.get(status.name), now
        if status.state is ModelState.LOADING and status.reason is StateReason.RESTARTING:
            self._restarts.add(status.name)
        elif status.state in OUTCOMES and before is not None and before[0] is ModelState.LOADING:
            self._loads.add(status.name, OUTCOMES[status.state])

    def _of(self, entry: ModelEntry) -> Iterator[Value]:
        name = (entry.name,)
        if entry.pull is not None:
            yield families.PULL_COMPLETED, name, entry.pull.completed_bytes
            yield families.PULL_TOTAL, name, entry.pull.total_bytes
            yield families.PULL_RATE, name, entry.pull.bytes_per_s
        executor = entry.executor
        if executor is None:
            return
        stats = executor.stats
        yield families.RUNNING, name, stats.running
        yield families.WAITING, name, max(0, executor.in_flight - stats.running)
        if entry.ready is None:
            return
        yield families.KV_TOKENS, name, entry.ready.options.kv_cache_tokens or 0
        yield families.KV_USED, name, stats.kv_used_tokens
        yield families.KV_PREFIX, name, stats.kv_idle_tokens
        yield families.SNAPSHOT_TOKENS, name, stats.snapshot_tokens
        yield families.SNAPSHOT_BYTES, name, stats.snapshot_bytes
        yield families.ENGINE_STEPS, name, stats.steps
        yield families.ENGINE_PREEMPTIONS, name, stats.preemptions
        for phase in ("prefill", "decode", "cached"):
            yield families.ENGINE_TOKENS, (*name, phase), getattr(stats, f"{phase}_tokens")
        for end in ("finished", "cancelled", "failed"):
            yield families.ENGINE_SEQUENCES, (*name, end), getattr(stats, end)
        for part in ("forward", "sampling", "overhead"):
            yield families.ENGINE_SECONDS, (*name, part), getattr(stats, f"{part}_s")
        for kind, size in self._memory(entry, entry.ready).items():
            yield families.MODEL_MEMORY, (*name, kind), size

    def _memory(self, entry: ModelEntry, ready: Ready) -> dict[str, int]:
        """By what it is for; of an architecture that no formula knows, what llama.cpp has told."""
        planned = self._plans.get(entry.name)
        if planned is None or planned[0] is not ready:
            planned = self._plans[entry.name] = (ready, self._planned(entry, ready))
        return {"weights": ready.info.weights_bytes, "kv_cache": ready.kv_cache_bytes, **planned[1]}

    def _planned(self, entry: ModelEntry, ready: Ready) -> dict[str, int]:
        if entry.header is None:
            return {}
        try:
            found = plan(entry.header, ready.options, [DeviceInfo(HOST, "", "cpu", 0, 0)], cores=self._cores)
        except BearError:
            return {}
        host = found.devices[0]
        return {"compute": host.compute_bytes, "overhead": host.overhead_bytes}


_OF_MODELS = (
    families.MODELS,
    families.RUNNING,
    families.WAITING,
    families.KV_TOKENS,
    families.KV_USED,
    families.KV_PREFIX,
    families.SNAPSHOT_TOKENS,
    families.SNAPSHOT_BYTES,
    families.MODEL_MEMORY,
    families.ENGINE_STEPS,
    families.ENGINE_TOKENS,
    families.ENGINE_SEQUENCES,
    families.ENGINE_PREEMPTIONS,
    families.ENGINE_SECONDS,
    families.PULL_COMPLETED,
    families.PULL_TOTAL,
    families.PULL_RATE,
)


def grouped(values: list[Value], metrics: tuple[Metric, ...]) -> list[Taken]:
    """Values by metric, in the metrics' order; each is there, if only by its name."""
    found: dict[str, list[tuple[Labels, float]]] = {metric.name: [] for metric in metrics}
    for metric, labels, value in values:
        found[metric.name].append((labels, value))
    return [Taken(metric, found[metric.name]) for metric in metrics]
