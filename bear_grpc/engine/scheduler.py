"""Who computes what in the next step: pure policy, without threads, clocks or I/O."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Items

from .cost import CostModel
from .kv import KvCache
from .plan import Budget, Plan, PlanItem
from .sequence import MOVES, Phase, Sequence
from .shares import Shares
from .turns import Turns
from .waiting import WaitingQueue

# About the full prefill rate on CPUs; small enough that newcomers do not wait long.
LONE_PREFILL_TOKENS = 128
# While streams decode, a step takes at most the longer of these, but it reads a tile for each of two
# prompts.
DECODE_STEPS, LEAST_TARGET_S, PROMPTS_AT_ONCE = 4, 0.1, 2
# Rows that llama.cpp's attention computes together: one less costs twice as much after a long context.
ATTENTION_ROWS = 64
# A tenant loses a slot to another that has so many fewer: with less they would take it from each other.
SLOTS_AHEAD = 2


class Scheduler:
    """Waiting and running sequences, and the slots between them: shared by tenants, then FIFO."""

    def __init__(
        self,
        kv: KvCache,
        cost: CostModel,
        budget: Budget,
        *,
        unified: bool,
        can_cut: bool,
        aging_s: float = 0.0,
    ) -> None:
        """`unified` and `can_cut` are the KV cache's, see `KvTraits`; `aging_s` see `WaitingQueue`."""
        self._kv = kv
        self._cost = cost
        self._budget = budget
        self._unified = unified
        self._can_cut = can_cut
        self.preemptions = 0
        self._shares = Shares()
        self._turns = Turns()
        self._arrivals = 0
        self._order = 0
        self._now = 0.0
        self._is_prefill_turn = False
        self._is_oldest_turn = True
        self._limit_s = math.inf
        self.waiting = WaitingQueue(self._shares, aging_s)
        self.running: dict[int, Sequence] = {}

    def submit(self, sequence: Sequence) -> None:
        """Takes a new sequence; it waits for a slot."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._shares.join(sequence)
        self.waiting.add(sequence)

    def sequences(self) -> Iterator[Sequence]:
        """All that are alive, the running ones first."""
        yield from self.running.values()
        yield from self.waiting

    @property
    def free_slots(self) -> int:
        """How many sequences may begin to run."""
        return self._budget.max_sequences - len(self.running)

    def ahead_of(self, sequence: Sequence) -> list[Sequence]:
        """Who waits and gets a slot before it, as it looks now."""
        order = self.waiting.order(self._now)
        return list(itertools.takewhile(lambda other: other is not sequence, order))

    def plan(self, limit_s: float = math.inf, now: float = 0.0) -> Plan:
        """The next step: free slots go to the head of the queue, then decode, then prefill.

        Prefill that would make it longer than `limit_s` is left out, where there is anything else to do.
        `now` is of the clock of `received_s`.
        """
        self._limit_s = limit_s
        self._now = now
        self._admit()
        started = tuple(self._begin())
        items = self._items()
        # Without a unified cache llama.cpp computes neighbouring ids together, in this order only.
        items.sort(key=lambda item: item.sequence.sequence_id)
        return Plan(started, tuple(items))

    def commit(self, items: Items[PlanItem]) -> None:
        """These runs have been computed: their tokens are in the KV cache."""
        for item in items:
            item.sequence.num_computed += item.count
            self._shares.charge(item.sequence)
            if item.sequence.phase is Phase.PREFILL and item.wants_logits:
                self._move(item.sequence, Phase.DECODE)

    def end(self, sequence: Sequence, phase: Phase, *, keep: bool) -> None:
        """Moves to a terminal phase and frees its place; `keep` leaves its tokens for others."""
        had_slot = sequence.phase is not Phase.WAITING
        self._move(sequence, phase)
        if had_slot:
            self._leave(sequence, keep=keep)
        else:
            self.waiting.remove(sequence)
        self._shares.leave(sequence)

    def youngest(self) -> Sequence:
        """Who is preempted first: of the tenant with the most slots, the youngest of the least urgent."""
        return max(
            self.running.values(),
            key=lambda sequence: (self._shares.tenant(sequence).running, sequence.priority, sequence.order),
        )

    def preempt(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Takes slot and KV from a running sequence; it is the next of its tenant's to get them again.

        `keep` leaves its KV where it is as long as there is room, else a snapshot is all that is left.
        """
        self._move(sequence, Phase.WAITING)
        self._leave(sequence, keep=keep or self._kv.keeps_snapshots)
        sequence.num_computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.add(sequence)

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        del self.running[sequence.id]
        self._shares.stop(sequence)
        self._kv.release(sequence, keep=keep)
        sequence.leader = None
        for other in self.running.values():
            if other.leader is sequence:
                other.leader = None
                other.share_at = -1  # looks again for what there is now

    def _admit(self) -> None:
        while (sequence := self.waiting.head(self._now)) is not None:
            sequence.order = self._order + 1
            if not self._has_place_for(sequence):
                victim = self._yielding_to(sequence)
                if victim is None:
                    return
                self.preempt(victim, keep=True)
                continue
            self.waiting.remove(sequence)
            self._order += 1
            self.running[sequence.id] = sequence
            self._shares.start(sequence)
            self._move(sequence, Phase.PREFILL)
            self._look_for_prefix(sequence)

    def _has_place_for(self, sequence: Sequence) -> bool:
        if not self.running:
            return True
        return self.free_slots > 0 and self._kv.has_room_for(sequence)

    def _yielding_to(self, sequence: Sequence) -> Sequence | None:
        """Who loses its slot to one that waits, because its tenant has more than a fair share."""
        if self._shares.alive < 2 or self.waiting.yields(sequence, self._now):
            return None
        victim = self.youngest()
        lead = self._shares.tenant(victim).running - self._shares.tenant(sequence).running
        return victim if lead >= SLOTS_AHEAD else None

    def _begin(self) -> Iterator[Sequence]:
        """Sequences whose first own token can be planned from now on."""
        for sequence in self.running.values():
            if sequence.share_at < 0:
                self._look_for_prefix(sequence)
            elif sequence.leader is not None and sequence.leader.num_computed >= sequence.share_at:
                sequence.leader, sequence.share_at = None, 0
                self._fill(sequence)
            if sequence.leader is None and not sequence.is_started:
                sequence.is_started = True
                yield sequence

    def _look_for_prefix(self, sequence: Sequence) -> None:
        sequence.share_at = 0
        have = self._kv.find(sequence).length
        match = self._kv.find_leader(sequence, have)
        if match.place is None:
            self._fill(sequence)
            return
        if sequence.sequence_id < 0:
            self._kv.reserve(sequence)
        sequence.leader, sequence.share_at = match.place.owner, match.length

    def _fill(self, sequence: Sequence) -> None:
        length = self._kv.fill(sequence)
        if not sequence.is_started:
            sequence.num_cached = min(length, sequence.num_prompt)

    def _items(self) -> list[PlanItem]:
        """What is computed for all that can go on, or for a fair choice of them."""
        runnable = [
            sequence
            for sequence in self.running.values()
            # One that is preempted while its reader stalls must not draw when it has been read again.
            if sequence.leader is None and sequence.credit > 0
        ]
        if self._shares.alive < 2:
            return self._items_for(runnable)
        turn = self._is_prefill_turn, self._is_oldest_turn
        items = self._items_for(runnable)
        fewest = self._turns.fewest(runnable)
        if fewest is not None:
            turn_after = self._is_prefill_turn, self._is_oldest_turn
            self._is_prefill_turn, self._is_oldest_turn = turn
            fewer = self._items_for(fewest)
            if not fewer or self._turns.is_time_for(self._seconds(items), self._seconds(fewer)):
                self._is_prefill_turn, self._is_oldest_turn = turn_after
            else:
                items = fewer
        self._turns.note(item.sequence for item in items)
        return items

    def _seconds(self, items: Items[PlanItem]) -> float:
        return self._cost.predict(sum(item.count for item in items))

    def _items_for(self, among: Collection[Sequence]) -> list[PlanItem]:
        decode = [
            PlanItem(sequence, sequence.num_computed, 1)
            for sequence in among
            if sequence.phase is Phase.DECODE
        ]
        ready = [sequence for sequence in among if sequence.phase is Phase.PREFILL]
        if len(ready) > 1 and self._shares.alive > 1:
            ready.sort(key=self._fair_order)
        if self._unified:
            return [*decode, *self._prefill(len(decode), ready)]
        return self._in_turn(decode, ready)

    def _fair_order(self, sequence: Sequence) -> tuple[int, int, int]:
        tenant = self._shares.tenant(sequence)
        return tenant.running, tenant.served, sequence.order

    def _in_turn(self, decode: list[PlanItem], ready: list[Sequence]) -> list[PlanItem]:
        """Decode and prefill of parts are computed one after the other: in steps of their own.

        Together llama.cpp would cut the prompt's run where the short runs end, across its tiles.
        """
        prefill = self._prefill_alike(len(decode), ready) if self._is_prefill_turn or not decode else []
        self._is_prefill_turn = not prefill
        return prefill or decode

    def _prefill_alike(self, num_decode: int, ready: list[Sequence]) -> list[PlanItem]:
        """The next run of one prompt, by turns the first one `ready` and the one with the shortest rest.

        With it the rests of others that are as long: equal runs are computed together.
        """
        if not ready:
            return []
        budget = self._prefill_budget(num_decode, sum(sequence.num_left for sequence in ready), len(ready))
        outputs = self._budget.max_outputs
        first = ready[0] if self._is_oldest_turn else min(ready, key=lambda sequence: sequence.num_left)
        self._is_oldest_turn = not self._is_oldest_turn
        alike = [other for other in ready if other is not first and other.num_left == first.num_left]
        items: list[PlanItem] = []
        for sequence in (first, *alike):
            count = _in_tiles(sequence.num_left, budget)
            if sequence.output.wants_prompt_logprobs:
                count = min(count, outputs)
                outputs -= count
            if not self._can_cut:
                count = self._until_shared(sequence, count)
            if count <= 0 or (items and count != items[0].count):
                break
            items.append(PlanItem(sequence, sequence.num_computed, count))
            budget -= count
        return items

    def _prefill(self, num_decode: int, ready: list[Sequence]) -> Iterator[PlanItem]:
        """Prompt tokens beside `num_decode` others: the first one `ready` and the shortest rest first."""
        if not ready:
            return
        budget = self._prefill_budget(num_decode, sum(sequence.num_left for sequence in ready), len(ready))
        outputs = self._budget.max_outputs - self._budget.max_sequences + 1
        oldest = ready[0]
        ready = sorted(ready, key=lambda sequence: sequence.num_left)
        # A long prompt does not keep short ones waiting, and they leave half of the step to it.
        kept = min(oldest.num_left, (budget + 1) // 2)
        kept_outputs = (outputs + 1) // 2 if oldest.output.wants_prompt_logprobs else 0
        for sequence in ready:
            if sequence is oldest:
                kept = kept_outputs = 0
            count = min(sequence.num_left, max(0, budget - kept))
            if sequence.output.wants_prompt_logprobs:
                count = max(0, min(count, outputs - kept_outputs))
                outputs -= count
            if not self._can_cut:
                count = self._until_shared(sequence, count)
            if count > 0:
                yield PlanItem(sequence, sequence.num_computed, count)
                budget -= count

    def _prefill_budget(self, num_decode: int, wanted: int, prompts: int) -> int:
        # Without a unified cache decode and prefill are computed one after the other.
        beside = num_decode if self._unified else 0
        most = min(wanted, self._budget.batch_tokens - beside)
        if not num_decode:
            return self._cost.most(self._limit_s, min(most, LONE_PREFILL_TOKENS))
        decode_s = self._cost.predict(num_decode)
        asked_s = self._budget.target_s
        target_s = asked_s or max(DECODE_STEPS * decode_s, LEAST_TARGET_S)
        budget = self._cost.most(target_s if self._unified else target_s - decode_s, most, beside=beside)
        efficient = ATTENTION_ROWS * min(prompts, PROMPTS_AT_ONCE) - beside % ATTENTION_ROWS
        budget = budget if asked_s else max(budget, min(most, efficient))
        if self._cost.predict(beside + budget) <= self._limit_s:
            return budget
        budget = self._cost.most(self._limit_s, budget, beside=beside)
        return budget if self._cost.predict(beside + budget) <= self._limit_s else 0

    def _until_shared(self, sequence: Sequence, count: int) -> int:
        """A state that cannot be cut is copied exactly where a follower needs it: a chunk ends there."""
        ends = [
            other.share_at - sequence.num_computed
            for other in self.running.values()
            if other.leader is sequence and other.share_at > sequence.num_computed
        ]
        return min([count, *ends])

    def _move(self, sequence: Sequence, phase: Phase) -> None:
        if phase not in MOVES[sequence.phase]:
            raise RuntimeError(f"sequence {sequence.id}: {sequence.phase.name} -> {phase.name}")
        sequence.phase = phase


def _in_tiles(left: int, budget: int) -> int:
    """How many of the tokens left are computed now, so that later runs fill their tiles.

    What does not fill one comes first, where there is little context to look back at.
    """
    if left <= budget:
        return left
    odd = left % ATTENTION_ROWS
    count = odd + (budget - odd) // ATTENTION_ROWS * ATTENTION_ROWS if budget >= odd else 0
    return count or budget
