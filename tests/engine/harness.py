"""An engine on a fake backend: submit, run, and read what each sequence got."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bear_grpc.backend.base import Batch, Outcome
from bear_grpc.engine.cost import CostModel
from bear_grpc.engine.engine import Engine, EngineSettings
from bear_grpc.engine.sequence import Sequence
from bear_grpc.engine.stop import TextMachine
from bear_grpc.errors import ErrorRecord
from bear_grpc.params import OutputParams, SamplingParams, StopParams
from bear_grpc.protocol import Delta, Ended, Finished, SequenceEvent, Started, Step
from bear_grpc.testing import FakeBackend, FakeClock, FakeVocabulary
from bear_grpc.types import FinishReason, LoadOptions, StopCause, Usage

GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
ENOUGH_STEPS = 10_000


@dataclasses.dataclass(frozen=True)
class Result:
    """What a caller sees of one sequence; times are left out.

    What came from the cache depends on the company: it is told, and does not count as a difference.
    """

    text: str
    ids: tuple[int, ...]
    reason: FinishReason | None = None
    cause: StopCause | None = None
    usage: Usage | None = None
    error: ErrorRecord | None = None
    cached: int = dataclasses.field(default=0, compare=False)


class SpyBackend(FakeBackend):
    """Keeps the batches, and calls `during` inside each forward."""

    def __init__(self, options: LoadOptions, **changes: object) -> None:
        super().__init__(options, **changes)
        self.batches: list[list[tuple[int, int, int, int]]] = []
        self.during: Callable[[], None] = lambda: None
        self.watch: Callable[[list[tuple[int, int, int, int]]], None] = lambda rows: None

    def forward(self, batch: Batch) -> Outcome:
        rows = zip(
            batch.sequence_ids[: batch.size].tolist(),
            batch.positions[: batch.size].tolist(),
            batch.tokens[: batch.size].tolist(),
            batch.outputs[: batch.size].tolist(),
            strict=True,
        )
        self.batches.append(list(rows))
        self.watch(self.batches[-1])
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
        step_target_s: float = 0.0,
        share_prefixes: bool = True,
        max_waiting_tokens: int = 2**30,
        options: LoadOptions | None = None,
        costs: CostModel | None = None,
        seconds_per_step: Callable[[int], float] | None = None,
        kind: type[SpyBackend] = SpyBackend,
        **backend: object,
    ) -> None:
        """With `seconds_per_step` forwards take time, and nothing else does."""
        shape = LoadOptions(
            max_sequences=max_sequences, batch_tokens=batch_tokens, context_length=context_length
        )
        options = (options or LoadOptions()).over(shape)
        self.max_sequences = max_sequences
        self.clock = FakeClock()
        self.seconds_between = 0.01 if seconds_per_step is None else 0.0
        if seconds_per_step is not None:
            backend |= {"clock": self.clock, "seconds_per_step": seconds_per_step}
        self.backend = kind(options, **backend)
        self.backend.watch = self._count_rows
        self.sequences: dict[int, Sequence] = {}
        self.computed: dict[int, list[int]] = {}
        self.steps: list[Step] = []
        self.times: list[float] = []
        self.engine = Engine(
            self.backend,
            clock=self.clock,
            emit=self._take,
            settings=EngineSettings(
                stall_timeout_s=stall_timeout_s,
                step_target_s=step_target_s,
                share_prefixes=share_prefixes,
                model="fake",
                max_waiting_tokens=max_waiting_tokens,
            ),
            costs=costs,
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
        **changes: object,
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
            **{"output": OutputParams(tokens=want_tokens), **changes},
        )
        self.sequences[id], self.computed[id] = sequence, []
        self.engine.submit(sequence)
        return sequence

    def _take(self, step: Step) -> None:
        self.steps.append(step)
        self.times.append(self.clock())

    def _count_rows(self, rows: list[tuple[int, int, int, int]]) -> None:
        """`computed` has the positions of a sequence that were in any batch, also in one that failed."""
        owners = {each.sequence_id: each.id for each in self.sequences.values()}
        for sequence_id, position, _, _ in rows:
            self.computed[owners[sequence_id]].append(position)

    def step(self) -> bool:
        """One step; some time passes."""
        self.clock.advance(self.seconds_between)
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
        usage = Usage(ending.usage.prompt_tokens, 0, ending.usage.completion_tokens)
        return Result(text, ids, ending.reason, ending.cause, usage, cached=ending.usage.cached_tokens)

    def is_clean(self) -> bool:
        """Whether nothing is left but prefixes kept for others: no slot, no other KV, no open sampler."""
        stats = self.engine.stats()
        samplers = [sampler.closed for sampler in self.backend.samplers]
        is_counted = stats.kv_used_tokens == stats.kv_idle_tokens == self.backend.kv_used()
        return not stats.running and not stats.waiting and is_counted and all(samplers)


def alone(prompt: str | list[int], **request: object) -> Result:
    """What a request gives when nothing else runs, its prompt in one chunk."""
    harness = Harness(max_sequences=1, batch_tokens=128)
    harness.submit(1, prompt, **request)
    harness.run()
    return harness.result(1)


__all__ = ["GREEDY", "FakeVocabulary", "Harness", "Result", "SpyBackend", "alone"]
