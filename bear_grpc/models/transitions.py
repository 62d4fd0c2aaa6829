"""The states of a model's life and every way between them; drawn in docs/lifecycle.md."""

from __future__ import annotations

from ..types import ModelState

TRANSITIONS: dict[ModelState, frozenset[ModelState]] = {
    ModelState.ABSENT: frozenset({ModelState.AVAILABLE, ModelState.LOADING}),
    ModelState.AVAILABLE: frozenset({ModelState.LOADING, ModelState.ABSENT}),
    ModelState.LOADING: frozenset({ModelState.READY, ModelState.FAILED, ModelState.AVAILABLE}),
    ModelState.READY: frozenset({ModelState.UNLOADING, ModelState.LOADING}),
    ModelState.UNLOADING: frozenset({ModelState.AVAILABLE}),
    ModelState.FAILED: frozenset({ModelState.LOADING, ModelState.AVAILABLE, ModelState.ABSENT}),
}

# Where a model has an executor; in the others it has none.
WITH_EXECUTOR = frozenset({ModelState.LOADING, ModelState.READY, ModelState.UNLOADING})
# Where it has been told how it is loaded.
WITH_READY = frozenset({ModelState.READY, ModelState.UNLOADING})


def check_transition(name: str, before: ModelState, after: ModelState) -> None:
    """Raises RuntimeError for a way that does not exist: the caller is wrong, whoever it is."""
    if after not in TRANSITIONS[before]:
        raise RuntimeError(f"{name}: {before.name} -> {after.name}")
