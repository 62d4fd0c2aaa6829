"""An engine on a fake backend: submit, run, and read what each sequence got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bear_grpc.backend.base import Batch, Outcome
from bear_grpc.engine.engine import Engine
from bear_grpc.engine.sequence import Sequence
from bear_grpc.engine.stop import TextMachine
from bear_grpc.errors import ErrorRecord
from bear_grpc.protocol import Delta, Ended, Finished, SequenceEvent, Started, Step
from bear_grpc.testing import FakeBackend, FakeClock, FakeVocabulary
from bear_grpc.types import FinishReason, LoadOptions, SamplingParams, StopCause, StopParams, Usage

GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
ENOUGH_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class Result:
    """What a caller sees of one sequence; times are left out."""

    text: str
    ids: tuple[int, ...]
    reason: FinishReason | None = None
    cause: StopCause | None = None
    usage: Usage | None = None
    error: ErrorRecord | None = None


class SpyBackend(FakeBackend):
    """Keeps the batches, and calls `during` inside each forward."""

    def __init__(self, options: LoadOptions, **changes: object) -> None:
        super().__init__(options, **changes)
        self.batches: list[list[tuple[int, int, int, int]]] = []
        self.during: Callable[[], None] = lambda: None

    def forward(self, batch: Batch) -> Outcome:
        rows = zip(
            batch.sequence_ids[: batch.size].tolist(),
            batch.positions[: batch.size].tolist(),
            batch.tokens[: batch.size].tolist(),
            batch.outputs[: batch.size].tolist(),
            strict=True,
        )
        self.batches.append(list(rows))
        self.during()
        return super().forward(batch)


class Harness:
    """Small batches and few slots, so that chunks and queues occur with short prompts."""

    def __init__(
        self,
        *,
        max_sequences: int = 3,
        batch_tokens: int = 8,
        context_length: int = 256,
        stall_timeout_s: float = 30.0,
        **backend: object,
    ) -> None:
        options = LoadOptions(
            max_sequences=max_sequences, batch_tokens=batch_tokens, context_length=context_length
        )
        self.max_sequences = max_sequences
        self.clock = FakeClock()
        self.backend = SpyBackend(options, **backend)
        self.steps: list[Step] = []
        self.engine = Engine(
            self.backend, clock=self.clock, emit=self.steps.append, stall_timeout_s=stall_timeout_s
        )

    def submit(
        self,
        id: int,
        prompt: str | list[int] = "hello",
        *,
        sampling: SamplingParams = GREEDY,
        stop: StopParams | None = None,
        max_tokens: int = 8,
        credit: int = 10_000,
        want_tokens: bool = True,
    ) -> Sequence:
        """Takes a sequence as the text thread would make it."""
        made = stop or StopParams(ignore_eos=True)
        sequence = Sequence(
            id=id,
            tokens=list(prompt.encode()) if isinstance(prompt, str) else list(prompt),
            sampling=sampling,
            stop=made,
            max_tokens=max_tokens,
            text=TextMachine(made.sequences),
            received_s=self.clock(),
            credit=credit,
            want_tokens=want_tokens,
        )
        self.engine.submit(sequence)
        return sequence

    def step(self) -> bool:
        """One step; some time passes."""
        self.clock.advance(0.01)
        return self.engine.step()

    def run(self) -> None:
        """Steps until nothing is left to do. Raises AssertionError if that takes for ever."""
        for _ in range(ENOUGH_STEPS):
            if not self.step():
                return
        raise AssertionError("the engine does not come to an end")

    def events(self, id: int) -> list[SequenceEvent]:
        """All events of a sequence, in order."""
        return [event for step in self.steps for event in step.events if event.id == id]

    def endings(self, id: int) -> list[Finished | Ended]:
        return [event for event in self.events(id) if isinstance(event, Finished | Ended)]

    def result(self, id: int) -> Result:
        """What the sequence came to. Raises AssertionError unless it ended once, and last."""
        events = self.events(id)
        [ending] = self.endings(id)
        assert events[-1] is ending
        assert [type(event) for event in events[:1]] in ([Started], [Ended])
        deltas = [event for event in events if isinstance(event, Delta)]
        text = "".join(delta.text for delta in deltas)
        ids = tuple(token.id for delta in deltas for token in delta.tokens)
        if isinstance(ending, Ended):
            return Result(text, ids, error=ending.error)
        return Result(text, ids, ending.reason, ending.cause, ending.usage)

    def is_clean(self) -> bool:
        """Whether nothing is left: no slot, no KV, no open sampler, no live sequence."""
        stats = self.engine.stats()
        kv = [self.backend.kv_length(id) for id in range(self.max_sequences)]
        samplers = [sampler.closed for sampler in self.backend.samplers]
        return not stats.running and not stats.waiting and not any(kv) and all(samplers)


def alone(prompt: str | list[int], **request: object) -> Result:
    """What a request gives when nothing else runs, its prompt in one chunk."""
    harness = Harness(max_sequences=1, batch_tokens=128)
    harness.submit(1, prompt, **request)
    harness.run()
    return harness.result(1)


__all__ = ["GREEDY", "FakeVocabulary", "Harness", "Result", "SpyBackend", "alone"]
