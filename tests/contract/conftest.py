"""The backends that the contract is tried on: fakes, and llama.cpp with small models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import bear_grpc
from bear_grpc.backend.base import Backend, Batch, Logits, Outcome
from bear_grpc.testing import FakeBackend
from bear_grpc.types import LoadOptions
from tests.helpers.architectures import ARCHITECTURES, write_architecture
from tests.helpers.ggufs import write_tiny_llama

MAX_SEQUENCES = 4
# One thread and plain attention: a sequence then gives the same bits in chunks of 2 tokens and more.
OPTIONS = LoadOptions(
    context_length=256,
    max_sequences=MAX_SEQUENCES,
    threads=1,
    batch_tokens=256,
    micro_batch_tokens=32,
    flash_attention=False,
)
BATCH = OPTIONS.batch_tokens or 0
DEMO = Path(bear_grpc.__file__).parent / "demo" / "bear-demo.gguf"
TEXT = "The bear and the fish are two of the river. " * 20
SPLIT = "-split"
"""Ends the name of a backend whose room for the KV cache is not unified."""

FAKES = ["fake", "fake-split", "fake-recurrent"]
MODELS = ["tiny", "tiny-split", "demo", *ARCHITECTURES, f"gemma2{SPLIT}"]
RECURRENT = ["fake-recurrent", *(name for name, made in ARCHITECTURES.items() if not made.can_cut)]
WINDOWED = ["gemma2", f"gemma2{SPLIT}"]
# Streams are copied by snapshots, which lack what no window sees.
MAY_REFUSE_A_PART = [f"gemma2{SPLIT}"]
SOURCE, COPY, OTHER, SCRATCH = range(MAX_SEQUENCES)
LENGTH, CUT = 60, 40  # of what is copied; more than WINDOW


def named(*names: str) -> pytest.MarkDecorator:
    """Runs a test on these backends."""
    marked = [name if name in FAKES else pytest.param(name, marks=pytest.mark.model) for name in names]
    return pytest.mark.parametrize("name", marked)


EVERY = named(*FAKES, *MODELS)
THAT_CUT = named(*(name for name in [*FAKES, *MODELS] if name not in RECURRENT))
THAT_CUT_WHAT_IS_RESTORED = named(
    *(name for name in [*FAKES, *MODELS] if name not in [*RECURRENT, *WINDOWED])
)
THAT_DO_NOT_CUT = named(*RECURRENT)
UNIFIED = named(*(name for name in [*FAKES, *MODELS] if not name.endswith(SPLIT) and name not in RECURRENT))

Open = Callable[..., Backend]


@pytest.fixture(scope="session")
def open_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Loads a backend by name and changed options, once in a session."""
    opened: dict[tuple[str, LoadOptions], Backend] = {}

    def load(name: str, options: LoadOptions) -> Backend:
        model = name.removesuffix(SPLIT)
        if model.startswith("fake"):
            return FakeBackend(options, can_cut=model != "fake-recurrent")
        from bear_grpc.backend import llama, native

        native.start()
        path = tmp_path_factory.mktemp("models") / f"{model}.gguf"
        if model in ARCHITECTURES:
            write_architecture(path, model)
        elif model == "tiny":
            write_tiny_llama(path, n_layer=2, dtype="Q8_0")
        else:
            path = DEMO
        return llama.LlamaBackend(path, options, cores=1, report=lambda stage, fraction: None)

    def get(name: str, **changes: object) -> Backend:
        options = msgspec.structs.replace(OPTIONS, kv_unified=not name.endswith(SPLIT), **changes)
        if (name, options) not in opened:
            opened[name, options] = load(name, options)
        return opened[name, options]

    yield get
    for backend in opened.values():
        backend.close()


def emptied(backend: Backend) -> Iterator[Backend]:
    """What a fixture yields from: the backend, whose KV cache is empty again afterwards."""
    yield backend
    backend.clear_abort()
    for sequence_id in range(backend.kv.sequence_ids):
        backend.kv_remove(sequence_id, 0)


def with_leftovers(backend: Backend) -> Iterator[Backend]:
    """As `emptied`; the room holds what no test computes, so that a stale cell shows."""
    for sequence_id in range(MAX_SEQUENCES):
        last = backend.vocabulary.size - 1 - 100 * (sequence_id % 2)
        forward(backend, (sequence_id, 0, list(range(last, last - LENGTH, -1)), False))
    for sequence_id in range(MAX_SEQUENCES):
        backend.kv_remove(sequence_id, 0)
    yield from emptied(backend)


@pytest.fixture(
    params=[
        "fake",
        pytest.param("tiny", marks=pytest.mark.model),
        pytest.param("demo", marks=pytest.mark.model),
    ]
)
def backend(request: pytest.FixtureRequest, open_backend: Open) -> Iterator[Backend]:
    """A loaded backend with an empty KV cache."""
    yield from emptied(open_backend(request.param))


def prompt(backend: Backend, length: int, text: str = TEXT) -> list[int]:
    """The first tokens of a text."""
    ids = backend.vocabulary.tokenize(text, add_special=True, parse_special=False)
    assert len(ids) >= length
    return ids[:length]


def forward(backend: Backend, *runs: tuple[int, int, list[int], bool]) -> tuple[Outcome, list[int]]:
    """Runs of sequence id, start, tokens, logits wanted: the outcome, and the row of each last token."""
    batch = Batch(BATCH)
    last = [batch.extend(*run) for run in runs]
    return backend.forward(batch), last


def logits(backend: Backend, sequence_id: int, start: int, tokens: list[int]) -> Logits:
    """A copy of the logits after a run that is computed in one pass."""
    outcome, [row] = forward(backend, (sequence_id, start, tokens, True))
    assert outcome is Outcome.DONE
    return backend.logits(row).copy()


@dataclasses.dataclass(frozen=True)
class Expectation:
    """Logits from scratch, and how far others may be from them."""

    logits: Logits
    tolerance: float

    def distance(self, row: Logits) -> float:
        return float(np.abs(row - self.logits).max())

    def agrees(self, row: Logits) -> bool:
        return self.distance(row) <= self.tolerance


def expectation(backend: Backend, tokens: list[int], tail: int) -> Expectation:
    """What follows `tokens`: computed at once, in two runs, and with the last token alone.

    The tolerance is four times what these differ by, and nothing for the fakes.
    That it is small is asserted: a token changed before the last run makes more
    of a difference, or a comparison would tell nothing. Uses SCRATCH.
    """
    start = len(tokens) - tail

    def in_two(changed: list[int]) -> Logits:
        backend.kv_remove(SCRATCH, 0)
        forward(backend, (SCRATCH, 0, changed[:start], False))
        return logits(backend, SCRATCH, start, tokens[start:])

    backend.kv_remove(SCRATCH, 0)
    ways = [logits(backend, SCRATCH, 0, tokens), in_two(tokens)]
    backend.kv_remove(SCRATCH, 0)
    forward(backend, (SCRATCH, 0, tokens[:-1], False))
    ways.append(logits(backend, SCRATCH, len(tokens) - 1, tokens[-1:]))
    spread = max(float(np.abs(a - b).max()) for a, b in itertools.combinations(ways, 2))
    exact = backend.info.architecture == "fake"
    found = Expectation(ways[1], 0.0 if exact else max(4 * spread, 1e-5 * float(np.ptp(ways[1]))))
    assert not exact or spread == 0
    for place in (start - 1, start // 2):
        changed = [*tokens[:place], 3 + (tokens[place] == 3), *tokens[place + 1 :]]
        assert found.distance(in_two(changed)) > 2 * found.tolerance
    backend.kv_remove(SCRATCH, 0)
    return found


def tokens_of(backend: Backend, length: int, tail: int) -> tuple[list[int], list[int], list[int]]:
    """A beginning, and two ways to go on from it."""
    tokens = prompt(backend, length + 2 * tail)
    return tokens[:length], tokens[length : length + tail], tokens[: -tail - 1 : -1]
