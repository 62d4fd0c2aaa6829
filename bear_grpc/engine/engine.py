"""The step: plan, forward, commit, and what it means for each sequence.

Owner thread only, but for `interrupt`. Emits frames' events; knows no socket.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items

from ..backend.base import Backend, Batch, Outcome
from ..errors import BackendError, BearError, DeadlineUnreachable, SlowConsumer
from ..protocol import Ended, Prefilled, SequenceEvent, Started, Step
from ..types import EngineStats, FinishReason, StepCost
from . import sampling
from .cost import CostModel
from .deadlines import Deadlines
from .delivery import Delivery, Ending
from .kv import KvCache
from .outbox import Counters, Outbox
from .places import Places
from .plan import Budget, Plan, PlanItem
from .scheduler import Scheduler
from .sequence import Phase, Sequence

log = logging.getLogger(__name__)


class EngineBroken(Exception):
    """Two forward passes in a row have failed: the context cannot be trusted any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the server decides about an engine. `step_target_s` 0: chosen from step times.

    `aging_s` of waiting make a request one priority more urgent, 0: nothing does.
    """

    stall_timeout_s: float = 30.0
    step_target_s: float = 0.0
    share_prefixes: bool = True
    aging_s: float = 10.0
    model: str = ""
    max_waiting_tokens: int = 2**18


class Engine:
    """All sequences of one model, one step at a time."""

    def __init__(
        self,
        backend: Backend,
        *,
        clock: Callable[[], float],
        emit: Callable[[Step], None],
        settings: EngineSettings | None = None,
        costs: CostModel | None = None,
        mark: Callable[[Items[int]], None] = lambda ids: None,
    ) -> None:
        """`clock` is CLOCK_MONOTONIC seconds; `emit` takes each step's events, must not block.

        `mark` gets the ids of the sequences that native code is about to work for, none after it.
        """
        options = backend.options
        assert options.max_sequences and options.batch_tokens  # a backend reports effective options
        self._backend = backend
        self._clock = clock
        self._settings = settings or EngineSettings()
        self._costs = costs or CostModel()
        self._threads = self._full_threads = options.threads or 1
        self._kv = KvCache(backend, share_prefixes=self._settings.share_prefixes)
        self._scheduler = Scheduler(
            self._kv,
            self._costs,
            Budget(
                options.max_sequences,
                options.batch_tokens,
                backend.max_outputs,
                self._settings.step_target_s,
            ),
            unified=backend.kv.unified,
            can_cut=backend.kv.can_cut,
            aging_s=self._settings.aging_s,
        )
        self._deadlines = Deadlines(self._scheduler, self._kv, self._costs, options.batch_tokens)
        self._places = Places(self._scheduler, self._settings.model, self._settings.max_waiting_tokens)
        self._batch = Batch(options.batch_tokens)
        self._live: dict[int, Sequence] = {}
        self._outbox = Outbox(emit, self.stats, clock)
        self._delivery = Delivery(backend, clock, self._outbox.tell)
        self._mark = mark
        self._failures = 0
        # Guards what `interrupt` reads; never held across a native call.
        self._step_lock = threading.Lock()
        self._in_step: frozenset[int] = frozenset()
        self._step_began_s: float | None = None
        self._step_predicted_s = 0.0
        self._count = Counters()

    @property
    def steps(self) -> int:
        """Forward passes begun so far."""
        return self._count.steps

    def step_age_s(self) -> float:
        """Any thread: how long the running forward pass has taken, 0 between steps."""
        began = self._step_began_s
        return 0.0 if began is None else self._clock() - began

    @property
    def step_predicted_s(self) -> float:
        """Any thread: how long the last forward pass begun was expected to take."""
        return self._step_predicted_s

    def costs(self) -> list[StepCost]:
        """Step times as they are known now, with all threads."""
        return self._costs.known()

    def set_threads(self, threads: int) -> None:
        """CPU threads from the next step on; what other models leave."""
        self._threads = threads
        self._backend.set_threads(threads)

    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence; it ends with exactly one Finished or Ended."""
        self._live[sequence.id] = sequence
        self._count.submitted += 1
        now = self._clock()
        if sequence.credit <= 0:  # its reader has not taken yet what another worker has sent
            sequence.stalled_since_s = now
        self._scheduler.submit(sequence)
        self._deadlines.take(sequence)
        late_s = None if sequence.has_begun else self._deadlines.unreachable_s(sequence, now)
        error = self._places.take(sequence, now) if late_s is None else DeadlineUnreachable(late_s)
        if error is not None:
            self._fail_sequence(sequence, error)
            self.flush()

    def cancel(self, id: int) -> None:
        """Ends a sequence because its caller left; nothing if it has ended."""
        sequence = self._live.get(id)
        if sequence is not None:
            self._count.cancelled += 1
            self._end(sequence, Phase.CANCELLED, Ended(id))

    def add_credit(self, id: int, tokens: int) -> None:
        """The reader of a sequence has taken `tokens` more."""
        sequence = self._live.get(id)
        if sequence is not None:
            sequence.credit += tokens
            if sequence.credit > 0:
                sequence.stalled_since_s = None

    def interrupt(self, id: int) -> None:
        """Any thread: stops the running step if it works for this sequence alone."""
        with self._step_lock:
            if self._in_step == {id}:
                self._backend.abort()

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        return EngineStats(
            **self._count.values(),
            preemptions=self._scheduler.preemptions,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            left_queue=self._places.left,
            queue_s=self._places.held_s(self._clock()),
            waiting_tokens=self._places.tokens,
            kv_used_tokens=self._kv.used_tokens,
            kv_idle_tokens=self._kv.idle_tokens,
            snapshot_tokens=self._kv.snapshots.tokens,
            snapshot_bytes=self._kv.snapshots.bytes,
        )

    def step(self) -> bool:
        """Runs one step if there is work; False if nothing could be planned.

        Raises EngineBroken after the second failure in a row; every sequence of
        the failed steps has had its ending then.
        """
        began = self._clock()
        self._end_stalled(began)
        is_over = self._end_due(began)
        plan = self._scheduler.plan(self._deadlines.step_limit_s(began), began)
        self._mark([item.sequence.id for item in plan.items])
        for sequence in plan.started:
            self._start(sequence, began)
        queued = self._places.look(began)
        for event in queued:
            self._outbox.tell(event)
        if plan.started or is_over or queued:
            self.flush()  # whoever waits need not wait for the step, too
        worked = bool(plan.items)
        if not worked:
            self._outbox.settle()
        else:
            native_s = self._count.forward_s + self._count.sampling_s
            self._run(plan)
            inside_s = self._count.forward_s + self._count.sampling_s - native_s
            self._count.overhead_s += self._clock() - began - inside_s
            self._mark(())
        self.flush()
        return worked

    def flush(self) -> None:
        """Emits what has happened since the last step, if anything."""
        self._outbox.flush()

    def seconds_to_event(self) -> float | None:
        """Time until a sequence must be ended, as it stalls or its deadline comes, or told its place."""
        since = [s.stalled_since_s for s in self._live.values() if s.stalled_since_s is not None]
        stalled_s = min(since, default=math.inf) + self._settings.stall_timeout_s
        end_s = min(stalled_s, self._deadlines.next_s(self._live.values()), self._places.due_s)
        return None if math.isinf(end_s) else max(0.0, end_s - self._clock())

    def _start(self, sequence: Sequence, now: float) -> None:
        sequence.admitted_s = sequence.admitted_s or now
        self._places.leave(sequence, now)
        params = sequence.sampling
        filters = None if sampling.is_plain_greedy(params) else self._backend.make_sampler(params)
        sequence.sampler = sampling.TokenSampler(params, filters, sequence.matcher)
        sequence.sampler.accept_prompt(sequence.tokens)
        sequence.sampler.state = sequence.state
        self._count.cached_tokens += sequence.num_cached
        started = Started(
            sequence.id, sequence.num_prompt, sequence.num_cached, sequence.max_tokens, sequence.truncated
        )
        self._outbox.tell(started)
        if not sequence.output.wants_prompt_logprobs:
            self._delivery.echo(sequence, sequence.num_prompt)

    def _run(self, plan: Plan) -> None:
        """One forward pass of the plan, or of as much of it as there is room for."""
        items: Items[PlanItem] = plan.items
        while items:
            if not self._kv.make_room(sum(item.count for item in items)):
                items = self._fewer(items)
                continue
            outcome, rows = self._forward(items)
            if outcome is not Outcome.NO_KV_ROOM:
                break
            # Nothing was applied: the room is more scattered than the count of tokens tells.
            items = items if self._kv.evict() else self._fewer(items)
        else:
            return
        self._conclude(items, outcome, rows)

    def _fewer(self, items: Items[PlanItem]) -> Items[PlanItem]:
        """The first half of a step; of a single token nothing, but the youngest sequence loses its place."""
        total = sum(item.count for item in items)
        if total > 1:
            left, kept = total // 2, []
            for item in items:
                if left > 0:
                    kept.append(dataclasses.replace(item, count=min(item.count, left)))
                    left -= item.count
            return kept
        victim = self._scheduler.youngest()
        if len(self._scheduler.running) == 1:
            self._fail_sequence(victim, BackendError("the KV cache has no room for a single sequence"))
            return []
        self._scheduler.preempt(victim)
        return [item for item in items if item.sequence is not victim]

    def _forward(self, items: Items[PlanItem]) -> tuple[Outcome, list[int]]:
        """Runs the items; gives the outcome and the last row of each."""
        self._batch.clear()
        rows = []
        for item in items:
            sequence = item.sequence
            draws = item.wants_logits and sequence.max_tokens > 0
            every = sequence.output.wants_prompt_logprobs and item.start < sequence.num_prompt
            rows.append(self._batch.extend(sequence.sequence_id, item.start, item.tokens, draws, every=every))
        self._count.steps += 1
        self._step_predicted_s = self._costs.predict(self._batch.size)
        self._step_began_s = began = self._clock()
        with self._step_lock:
            self._in_step = frozenset(item.sequence.id for item in items)
        try:
            outcome = self._backend.forward(self._batch)
        finally:
            with self._step_lock:
                self._in_step = frozenset()
                self._backend.clear_abort()
            self._step_began_s = None
        seconds = self._clock() - began
        self._count.forward_s += seconds
        if outcome is Outcome.DONE and self._threads == self._full_threads:
            self._costs.learn(self._batch.size, seconds)
        return outcome, rows

    def _conclude(self, items: Items[PlanItem], outcome: Outcome, rows: list[int]) -> None:
        if outcome is Outcome.DONE:
            self._failures = 0
            self._commit(items, rows)
        elif outcome is Outcome.ABORTED:
            self._resume_after_abort(items)
        else:
            self._fail(items, outcome)

    def _commit(self, items: Items[PlanItem], rows: list[int]) -> None:
        self._scheduler.commit(items)
        for item, row in zip(items, rows, strict=True):
            sequence = item.sequence
            if item.start < sequence.num_prompt:
                self._count.prefill_tokens += item.count
                self._tell_prefilled(item, row)
            if item.wants_logits:
                self._advance(sequence, row)

    def _tell_prefilled(self, item: PlanItem, row: int) -> None:
        sequence = item.sequence
        if sequence.output.wants_prompt_logprobs:
            self._delivery.echo_rows(item, row)
        done = min(item.start + item.count, sequence.num_prompt)
        # What is read again after a preemption has been told.
        if sequence.output.prefill_progress and done > sequence.told_prefilled:
            sequence.told_prefilled = done
            self._outbox.tell(Prefilled(sequence.id, done, sequence.num_prompt))

    def _advance(self, sequence: Sequence, row: int) -> None:
        """Draws the next token of a sequence; its ending if that is one."""
        if sequence.max_tokens == 0:
            self._finish(sequence, Ending(FinishReason.LENGTH))
            return
        before = sequence.sampling_s
        try:
            ending = self._delivery.draw(sequence, row)
        except BearError as exc:
            self._fail_sequence(sequence, exc)
            return
        self._count.sampling_s += sequence.sampling_s - before
        self._count.decode_tokens += 1
        if ending is not None:
            self._finish(sequence, ending)

    def _finish(self, sequence: Sequence, ending: Ending) -> None:
        self._count.finished += 1
        self._end(sequence, Phase.FINISHED, self._delivery.finish(sequence, ending))

    def _end(self, sequence: Sequence, phase: Phase, event: SequenceEvent) -> None:
        """The one place where a sequence's resources are released and its ending is told."""
        self._scheduler.end(sequence, phase, keep=phase is not Phase.FAILED)
        self._places.leave(sequence, self._clock())
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        del self._live[sequence.id]
        self._outbox.tell(event)

    def _resume_after_abort(self, items: Items[PlanItem]) -> None:
        """Earlier micro-batches of an aborted step stay in the KV cache: go on from there."""
        for item in items:
            sequence = item.sequence
            kept = item.start
            if sequence.phase is Phase.PREFILL and not sequence.output.wants_prompt_logprobs:
                # At least one token must be left to be evaluated for its logits.
                kept = min(self._backend.kv_length(sequence.sequence_id), len(sequence.tokens) - 1)
            self._kv.truncate(sequence, kept)
            if item.start < sequence.num_prompt:
                self._count.prefill_tokens += max(0, sequence.num_computed - item.start)

    def _fail(self, items: Items[PlanItem], outcome: Outcome) -> None:
        self._failures += 1
        log.error("forward failed: %s, %d tokens, step %d", outcome.name, self._batch.size, self.steps)
        for item in items:
            self._fail_sequence(item.sequence, BackendError("the computation failed"))
        if self._failures >= 2:
            self.flush()
            raise EngineBroken(outcome.name)

    def _fail_sequence(self, sequence: Sequence, error: BearError) -> None:
        self._count.failed += 1
        self._end(sequence, Phase.FAILED, Ended(sequence.id, error.to_record()))

    def _end_stalled(self, now: float) -> None:
        stalled = [
            sequence
            for sequence in self._live.values()
            if sequence.stalled_since_s is not None
            and now - sequence.stalled_since_s >= self._settings.stall_timeout_s
        ]
        for sequence in stalled:
            self._fail_sequence(sequence, SlowConsumer(self._settings.stall_timeout_s))

    def _end_due(self, now: float) -> bool:
        """Ends those whose time is over; whether there was one."""
        due = self._deadlines.due(self._live.values(), now)
        for sequence in due:
            if sequence.has_begun:
                self._finish(sequence, Ending(FinishReason.DEADLINE))
            else:
                self._fail_sequence(sequence, self._deadlines.passed(sequence))
        return bool(due)
