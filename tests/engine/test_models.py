"""The first law on real models: company, shared prefixes and preemption change no greedy answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bear_grpc
from bear_grpc.backend.base import Backend
from bear_grpc.engine.engine import Engine, EngineSettings
from bear_grpc.engine.sequence import Sequence
from bear_grpc.engine.stop import TextMachine
from bear_grpc.params import OutputParams, StopParams
from bear_grpc.protocol import Delta, Finished, Step
from bear_grpc.types import LoadOptions
from tests.engine.harness import GREEDY
from tests.helpers.architectures import ARCHITECTURES, write_architecture
from tests.helpers.ties import FACTOR, Greedy, are_same, noise

pytestmark = pytest.mark.model

DEMO = Path(bear_grpc.__file__).parent / "demo" / "bear-demo.gguf"
# One thread and plain attention: sums depend on the shape of a step as little as they can.
OPTIONS = LoadOptions(context_length=256, max_sequences=3, threads=1, flash_attention=False, repack=False)
KINDS = ["demo", "demo-split", *ARCHITECTURES]
STEPS = 5000


@pytest.fixture(scope="module", params=KINDS)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    from bear_grpc.backend import llama, native

    native.start()
    name = request.param.removesuffix("-split")
    path = DEMO if name == "demo" else tmp_path_factory.mktemp("models") / f"{name}.gguf"
    if name != "demo":
        write_architecture(path, name)
    options = LoadOptions(kv_unified=name == request.param).over(OPTIONS)
    made = llama.LlamaBackend(path, options, cores=1, report=lambda stage, fraction: None)
    yield made
    made.close()


class Run:
    """An engine on a backend that is used again: nothing of it is left at the end."""

    def __init__(self, backend: Backend, *, share_prefixes: bool) -> None:
        self._backend = backend
        self._steps: list[Step] = []
        settings = EngineSettings(share_prefixes=share_prefixes)
        self.engine = Engine(backend, clock=time.monotonic, emit=self._steps.append, settings=settings)

    def submit(self, id: int, prompt: list[int], max_tokens: int) -> None:
        self.engine.submit(
            Sequence(
                id=id,
                tokens=list(prompt),
                sampling=GREEDY,
                stop=StopParams(ignore_eos=True),
                max_tokens=max_tokens,
                text=TextMachine(),
                received_s=time.monotonic(),
                credit=1000,
                output=OutputParams(top_logprobs=2),
            )
        )

    def finish(self) -> None:
        """Steps to the end, and gives up what is kept."""
        for _ in range(STEPS):
            if not self.engine.step():
                break
        else:
            raise AssertionError("the engine does not come to an end")
        stats = self.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.kv_used_tokens == stats.kv_idle_tokens
        for id in range(self._backend.kv.sequence_ids):
            self._backend.kv_remove(id, 0)

    def answer(self, id: int) -> Greedy:
        events = [event for step in self._steps for event in step.events if event.id == id]
        assert isinstance(events[-1], Finished), events[-1:]
        return Greedy.of([token for event in events if isinstance(event, Delta) for token in event.tokens])


def alone(backend: Backend, prompt: list[int], max_tokens: int) -> Greedy:
    run = Run(backend, share_prefixes=False)
    run.submit(0, prompt, max_tokens)
    run.finish()
    return run.answer(0)


def compare(backend: Backend, asked: list[tuple[list[int], int]], between: Callable[[Run, int], None]) -> Run:
    """Runs all with company; `between` steps after each submit. Each must be the same as alone."""
    together = Run(backend, share_prefixes=True)
    for id, (prompt, max_tokens) in enumerate(asked):
        together.submit(id, prompt, max_tokens)
        between(together, id)
    together.finish()
    pairs = [(alone(backend, *ask), together.answer(id)) for id, ask in enumerate(asked)]
    tolerance = FACTOR * noise(pairs)
    assert [are_same(one, other, tolerance) for one, other in pairs] == [True] * len(asked)
    # The rule excuses ties only: most of a model's choices are clearer than the noise.
    leads = sorted(lead for one, _ in pairs for lead in one.leads)
    assert tolerance < leads[len(leads) // 4]
    return together


def words(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(3, min(vocab, 250)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_answers_in_company_are_those_given_alone(backend, seed):
    """Prompts that begin alike arrive together, during and after each other, on every kind of memory."""
    rng = random.Random(seed)
    vocab = backend.info.vocab_size
    starts = [words(rng, 70, vocab), words(rng, 45, vocab)]
    # The first two arrive together: one takes up what the other reads, however fast steps are.
    begins = [starts[0], starts[0], *(rng.choice(starts) for _ in range(6))]
    asked = [(start + words(rng, rng.randint(1, 30), vocab), rng.randint(4, 16)) for start in begins]

    def between(run: Run, id: int) -> None:
        for _ in range(rng.choice([0, 0, 1, 5, 20]) if id else 0):
            run.engine.step()

    run = compare(backend, asked, between)
    assert run.engine.stats().cached_tokens > 0


def test_conversation_that_goes_on_takes_up_what_it_has_said(backend):
    """Also a state that cannot be cut: the next turn begins with all of the one before."""
    rng = random.Random(7)
    vocab = backend.info.vocab_size
    prompt = words(rng, 40, vocab)
    turns = []
    for _ in range(3):
        turns.append((list(prompt), 8))
        prompt += [*alone(backend, prompt, 8).ids, *words(rng, 12, vocab)]

    def between(run: Run, _: int) -> None:
        while run.engine.step():
            pass

    run = compare(backend, turns, between)
    # Of each turn before, all but the token drawn last, which was never computed.
    assert run.engine.stats().cached_tokens >= 40 + 7 + 60 + 7


def test_answers_to_one_prompt_read_it_once(backend):
    prompt = words(random.Random(9), 100, backend.info.vocab_size)
    run = compare(backend, [(prompt, 6)] * 3, lambda run, id: None)
    assert run.engine.stats().prefill_tokens == 100 + 2
