"""The step: plan, forward, commit, and what it means for each sequence.

Owner thread only, but for `interrupt`. Emits frames' events; knows no socket.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..backend.base import Backend, Batch, Outcome
from ..errors import BackendError, BearError, SlowConsumer
from ..protocol import Delta, Ended, Finished, SequenceEvent, Started, Step, Token
from ..types import EngineStats, FinishReason, StopCause
from . import sampling
from .scheduler import Plan, PlanItem, Scheduler
from .sequence import Phase, Sequence

log = logging.getLogger(__name__)

# About the full prefill rate on CPUs; small enough that neighbours do not wait long.
PREFILL_TOKENS = 128


class EngineBroken(Exception):
    """Two forward passes in a row have failed: the context cannot be trusted any more."""


class Engine:
    """All sequences of one model, one step at a time."""

    def __init__(
        self,
        backend: Backend,
        *,
        clock: Callable[[], float],
        emit: Callable[[Step], None],
        stall_timeout_s: float = 30.0,
    ) -> None:
        """`clock` is CLOCK_MONOTONIC seconds; `emit` takes each step's events, must not block."""
        options = backend.options
        assert options.max_sequences and options.batch_tokens  # a backend reports effective options
        self._backend = backend
        self._clock = clock
        self._emit = emit
        self._stall_timeout_s = stall_timeout_s
        self._scheduler = Scheduler(
            max_sequences=options.max_sequences,
            batch_tokens=options.batch_tokens,
            prefill_tokens=PREFILL_TOKENS,
        )
        self._batch = Batch(options.batch_tokens)
        self._live: dict[int, Sequence] = {}
        self._events: list[SequenceEvent] = []
        self._failures = 0
        # Guards what `interrupt` reads; never held across a native call.
        self._step_lock = threading.Lock()
        self._in_step: frozenset[int] = frozenset()
        self._step_began_s: float | None = None
        self._steps = self._prefill_tokens = self._decode_tokens = 0
        self._submitted = self._finished = self._cancelled = self._failed = 0

    @property
    def steps(self) -> int:
        """Forward passes begun so far."""
        return self._steps

    def step_age_s(self) -> float:
        """Any thread: how long the running forward pass has taken, 0 between steps."""
        began = self._step_began_s
        return 0.0 if began is None else self._clock() - began

    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence; it ends with exactly one Finished or Ended."""
        self._live[sequence.id] = sequence
        self._submitted += 1
        self._scheduler.submit(sequence)

    def cancel(self, id: int) -> None:
        """Ends a sequence because its caller left; nothing if it has ended."""
        sequence = self._live.get(id)
        if sequence is not None:
            self._cancelled += 1
            self._end(sequence, Phase.CANCELLED, Ended(id))

    def add_credit(self, id: int, tokens: int) -> None:
        """The reader of a sequence has taken `tokens` more."""
        sequence = self._live.get(id)
        if sequence is not None:
            sequence.credit += tokens
            sequence.stalled_since_s = None

    def interrupt(self, id: int) -> None:
        """Any thread: stops the running step if it works for this sequence alone."""
        with self._step_lock:
            if self._in_step == {id}:
                self._backend.abort()

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        running = self._scheduler.running.values()
        return EngineStats(
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            submitted=self._submitted,
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            running=len(running),
            waiting=len(self._scheduler.waiting),
            kv_used_tokens=sum(sequence.num_computed for sequence in running),
        )

    def step(self) -> bool:
        """Runs one step if there is work; False if nothing could be planned.

        Raises EngineBroken after the second failure in a row; every sequence of
        the failed steps has had its ending then.
        """
        now = self._clock()
        self._end_stalled(now)
        plan = self._scheduler.plan()
        for sequence in plan.admitted:
            self._start(sequence, now)
        worked = bool(plan.items)
        if worked:
            self._run(plan)
        self.flush()
        return worked

    def flush(self) -> None:
        """Emits what has happened since the last step, if anything."""
        if self._events:
            events, self._events = self._events, []
            self._emit(Step(events, self.stats()))

    def seconds_to_stall(self) -> float | None:
        """Time until a stalled sequence must be ended; None if none is stalled."""
        since = [s.stalled_since_s for s in self._live.values() if s.stalled_since_s is not None]
        return max(0.0, min(since) + self._stall_timeout_s - self._clock()) if since else None

    def _start(self, sequence: Sequence, now: float) -> None:
        sequence.admitted_s = now
        if not sampling.is_plain_greedy(sequence.sampling):
            sequence.sampler = self._backend.make_sampler(sequence.sampling)
            if sequence.sampling.uses_penalties:
                window = sequence.sampling.repetition_window
                seen = sequence.tokens if window < 0 else sequence.tokens[-window:]
                for token in seen:
                    sequence.sampler.accept(token)
        self._events.append(Started(sequence.id, sequence.num_prompt, 0, sequence.max_tokens))

    def _run(self, plan: Plan) -> None:
        rows: list[tuple[PlanItem, int]] = []
        self._batch.clear()
        for item in plan.items:
            sequence = item.sequence
            draws = item.wants_logits and sequence.max_tokens > 0
            row = self._batch.extend(sequence.sequence_id, item.start, item.tokens, draws)
            if item.wants_logits:
                rows.append((item, row))
        outcome = self._forward(plan)
        if outcome is Outcome.DONE:
            self._failures = 0
            self._count(plan)
            self._scheduler.commit(plan)
            for item, row in rows:
                self._advance(item.sequence, row)
        elif outcome is Outcome.ABORTED:
            self._resume_after_abort(plan)
        else:
            self._fail(plan, outcome)

    def _forward(self, plan: Plan) -> Outcome:
        self._steps += 1
        self._step_began_s = self._clock()
        with self._step_lock:
            self._in_step = frozenset(item.sequence.id for item in plan.items)
        try:
            return self._backend.forward(self._batch)
        finally:
            with self._step_lock:
                self._in_step = frozenset()
                self._backend.clear_abort()
            self._step_began_s = None

    def _count(self, plan: Plan) -> None:
        for item in plan.items:
            if item.sequence.phase is Phase.PREFILL:
                self._prefill_tokens += item.count

    def _advance(self, sequence: Sequence, row: int) -> None:
        """Draws the next token of a sequence and tells what it brings."""
        now = self._clock()
        if sequence.max_tokens == 0:
            self._finish(sequence, now, FinishReason.LENGTH)
            return
        logits = self._backend.logits(row)
        token = sampling.choose(sequence.sampling, sequence.sampler, logits, len(sequence.tokens))
        if sequence.sampler is not None:
            sequence.sampler.accept(token)
        self._decode_tokens += 1
        sequence.tokens.append(token)
        sequence.first_token_s = sequence.first_token_s or now
        sequence.last_token_s = now
        sequence.credit -= 1
        if sequence.credit <= 0:
            sequence.stalled_since_s = now
        self._take_token(sequence, token, now)

    def _take_token(self, sequence: Sequence, token: int, now: float) -> None:
        vocabulary = self._backend.vocabulary
        if vocabulary.is_eog(token) and not sequence.stop.ignore_eos:
            self._finish(sequence, now, FinishReason.STOP, StopCause(eog_token=token), token)
            return
        if token in sequence.stop.token_ids:
            self._finish(sequence, now, FinishReason.STOP, StopCause(token_id=token), token)
            return
        text, matched = sequence.text.push(vocabulary.piece(token))
        self._tell(sequence, text, token)
        if matched is not None:
            self._finish(sequence, now, FinishReason.STOP, StopCause(sequence=matched))
        elif sequence.num_completion >= sequence.max_tokens:
            self._finish(sequence, now, FinishReason.LENGTH)

    def _tell(self, sequence: Sequence, text: str, token: int | None) -> None:
        tokens = []
        if token is not None and sequence.want_tokens:
            tokens = [Token(token, self._backend.vocabulary.piece(token, special=True))]
        self._events.append(Delta(sequence.id, text, 0 if token is None else 1, tokens))

    def _finish(
        self,
        sequence: Sequence,
        now: float,
        reason: FinishReason,
        cause: StopCause | None = None,
        silent_token: int | None = None,
    ) -> None:
        """Ends a sequence well; `silent_token` ended it and is not part of the text."""
        if cause is None or cause.sequence is None:
            text, matched = sequence.text.flush()
            if matched is not None:
                reason, cause = FinishReason.STOP, StopCause(sequence=matched)
            if text or silent_token is not None:
                self._tell(sequence, text, silent_token)
        self._finished += 1
        finished = Finished(sequence.id, reason, cause, sequence.usage, sequence.timings(now))
        self._end(sequence, Phase.FINISHED, finished)

    def _end(self, sequence: Sequence, phase: Phase, event: Finished | Ended) -> None:
        """The one place where a sequence's resources are released and its ending is told."""
        sequence_id = self._scheduler.end(sequence, phase)
        if sequence_id is not None:
            self._backend.kv_remove(sequence_id, 0)
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        del self._live[sequence.id]
        self._events.append(event)

    def _resume_after_abort(self, plan: Plan) -> None:
        """Earlier micro-batches of an aborted step stay in the KV cache: go on from there."""
        for item in plan.items:
            sequence = item.sequence
            if sequence.phase is Phase.PREFILL:
                # At least one prompt token must be left to be evaluated for its logits.
                kept = min(self._backend.kv_length(sequence.sequence_id), len(sequence.tokens) - 1)
            else:
                kept = item.start
            if self._backend.kv_remove(sequence.sequence_id, kept):
                sequence.num_computed = kept
            else:
                self._backend.kv_remove(sequence.sequence_id, 0)
                sequence.num_computed = 0

    def _fail(self, plan: Plan, outcome: Outcome) -> None:
        self._failures += 1
        log.error("forward failed: %s, %d tokens, step %d", outcome.name, self._batch.size, self._steps)
        for item in plan.items:
            self._fail_sequence(item.sequence, BackendError("the computation failed"))
        if self._failures >= 2:
            self.flush()
            raise EngineBroken(outcome.name)

    def _fail_sequence(self, sequence: Sequence, error: BearError) -> None:
        self._failed += 1
        self._end(sequence, Phase.FAILED, Ended(sequence.id, error.to_record()))

    def _end_stalled(self, now: float) -> None:
        stalled = [
            sequence
            for sequence in self._live.values()
            if sequence.stalled_since_s is not None
            and now - sequence.stalled_since_s >= self._stall_timeout_s
        ]
        for sequence in stalled:
            self._fail_sequence(sequence, SlowConsumer(self._stall_timeout_s))
