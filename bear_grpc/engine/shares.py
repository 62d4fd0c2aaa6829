"""How much of the engine each tenant holds and has had. Pure bookkeeping, without a clock.

Service is counted as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), their
virtual token counter: a token of a prompt costs 1, a token that was drawn 2, and who begins to ask again
is lifted to the least of those who never stopped: idle time is no credit.
"""

from __future__ import annotations

import dataclasses

from .sequence import Sequence

PROMPT_COST, DRAWN_COST = 1, 2
# Tenants, and tags of one, that ask for nothing now and are remembered: those that have had the most.
MAX_IDLE = 256


@dataclasses.dataclass(slots=True, eq=False)
class Party:
    """A tenant, or one tag of a tenant.

    `served` is what it has had, `alive` and `running` are counts of its sequences.
    """

    served: int = 0
    alive: int = 0
    running: int = 0
    tags: dict[str, Party] = dataclasses.field(default_factory=dict)

    def charge(self, cost: int) -> None:
        """It has been served `cost` more."""
        self.served += cost


class Shares:
    """The tenants of an engine, each with its tags. Owner thread only."""

    def __init__(self) -> None:
        self._tenants: dict[str, Party] = {}

    def tenant(self, sequence: Sequence) -> Party:
        """Whose sequence it is; it must be alive."""
        return self._tenants[sequence.tenant]

    def tag(self, sequence: Sequence) -> Party:
        """Which part of the tenant it belongs to."""
        return self._tenants[sequence.tenant].tags[sequence.tag]

    @property
    def alive(self) -> int:
        """How many tenants have sequences that wait or run."""
        return sum(party.alive > 0 for party in self._tenants.values())

    def join(self, sequence: Sequence) -> None:
        """A sequence is new."""
        tenant = _join(self._tenants, sequence.tenant)
        _join(tenant.tags, sequence.tag)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        tenant = self.tenant(sequence)
        _leave(tenant.tags, sequence.tag)
        _leave(self._tenants, sequence.tenant)

    def start(self, sequence: Sequence) -> None:
        """It has a slot now."""
        self.tenant(sequence).running += 1
        self.tag(sequence).running += 1

    def stop(self, sequence: Sequence) -> None:
        """It has none any more."""
        self.tenant(sequence).running -= 1
        self.tag(sequence).running -= 1

    def charge(self, sequence: Sequence) -> None:
        """What was computed of a sequence since it was charged last; what is read again is free."""
        done = sequence.num_computed
        if done <= sequence.num_charged:
            return
        drawn = done - max(sequence.num_charged, sequence.num_prompt)
        prompt = max(0, min(done, sequence.num_prompt) - sequence.num_charged)
        cost = PROMPT_COST * prompt + DRAWN_COST * max(0, drawn)
        sequence.num_charged = done
        self.tenant(sequence).charge(cost)
        self.tag(sequence).charge(cost)


def _join(parties: dict[str, Party], name: str) -> Party:
    party = parties.setdefault(name, Party())
    if not party.alive:
        party.served = max(party.served, _least(parties))
    party.alive += 1
    return party


def _leave(parties: dict[str, Party], name: str) -> None:
    """Forgets those that nothing is to be remembered of: who comes new is lifted as high."""
    parties[name].alive -= 1
    if parties[name].alive:
        return
    if not any(party.alive for party in parties.values()):
        parties.clear()
        return
    least = _least(parties)
    idle = sorted((party.served, key) for key, party in parties.items() if not party.alive)
    for place, (served, key) in enumerate(idle):
        if served <= least or len(idle) - place > MAX_IDLE:
            del parties[key]


def _least(parties: dict[str, Party]) -> int:
    """The least that one of those who ask has been served."""
    return min((party.served for party in parties.values() if party.alive), default=0)
