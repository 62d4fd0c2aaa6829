"""Bounded queues: who is refused, what it is told, and that whoever does as told is served."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import Counter

import pytest

from bear_grpc.errors import QueueFull
from bear_grpc.executor.admission import Admission
from bear_grpc.executor.texts import Texts
from bear_grpc.outflow import MOST_RETRY_S
from bear_grpc.protocol import TextJob, TextResult
from bear_grpc.testing import FakeClock


def refused(admission: Admission, waiting: int, asked: int = 1) -> QueueFull | None:
    try:
        admission.check(waiting, asked)
    except QueueFull as exc:
        return exc
    return None


@pytest.mark.parametrize(
    ("waiting", "asked", "is_full"),
    [(0, 1, False), (3, 1, False), (4, 1, True), (2, 3, True), (0, 9, False), (1, 9, True), (9, 1, True)],
)
def test_queue_takes_as_many_as_its_limit_and_any_number_while_it_is_empty(waiting, asked, is_full):
    assert (refused(Admission("m", 4), waiting, asked) is not None) == is_full


@pytest.mark.parametrize(
    ("held", "asked", "is_full"),
    [
        ({"a": 8}, 1, False),  # half of the queue is another's
        ({"a": 8}, 4, False),
        ({"a": 8}, 5, True),
        ({"a": 8, "b": 3}, 1, False),
        ({"a": 8, "b": 4}, 1, True),
        ({"a": 8, "c": 1}, 2, False),
        ({"a": 8, "c": 1}, 3, True),
        ({"b": 8}, 1, True),
        ({"a": 15}, 2, True),  # twice the limit is the end of it
    ],
)
def test_queue_that_others_have_filled_takes_a_tenants_share(held, asked, is_full):
    admission = Admission("m", 8)
    waiting = sum(held.values())
    try:
        admission.check(waiting, asked, "b", lambda: held)
    except QueueFull:
        assert is_full
    else:
        assert not is_full


def test_error_tells_what_is_counted_and_all_numbers():
    error = refused(Admission("m", 4, unit="texts"), 3, 2)
    assert error.metadata == {"model": "m", "unit": "texts", "limit": "4", "waiting": "3", "asked": "2"}


@pytest.mark.parametrize(("waiting", "asked", "missing"), [(4, 1, 1), (4, 3, 3), (7, 1, 4), (2, 9, 2)])
def test_retry_is_as_long_as_what_is_missing_takes_to_leave(waiting, asked, missing):
    admission = Admission("m", 4, assumed_per_s=2.0, clock=FakeClock())
    assert refused(admission, waiting, asked).retry_after_s == pytest.approx(missing / 2)


async def test_text_jobs_are_refused_with_a_retry_by_how_quickly_they_end():
    clock = FakeClock()
    texts = Texts("m", 2, clock)
    for number in range(100):
        jobs = [TextJob(2 * number), TextJob(2 * number + 1)]
        for job in jobs:
            texts.add(job)
        for job in jobs:
            clock.advance(0.5)
            texts.take(TextResult(job.id))
            texts.remove(job)
        clock.advance(60)  # in which nobody waits
    for id in (1000, 1001):
        texts.add(TextJob(id))
    with pytest.raises(QueueFull) as caught:
        texts.add(TextJob(1002))
    assert caught.value.metadata["unit"] == "texts"
    assert caught.value.retry_after_s == pytest.approx(0.5, rel=0.1)


# A crowd on a fake clock


@dataclasses.dataclass
class Crowd:
    """Clients that all come at once, and come again as often and as late as they are told."""

    clients: int
    limit: int
    slots: int
    service_s: float
    clock: FakeClock = dataclasses.field(default_factory=FakeClock)
    tries: Counter[int] = dataclasses.field(default_factory=Counter)
    returns: list[float] = dataclasses.field(default_factory=list)
    served: list[int] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        admission = Admission("m", self.limit, clock=self.clock)
        numbers = itertools.count()
        events: list[tuple[float, int, int, str]] = []
        waiting: list[int] = []
        running, since_s = 0, self.clock()

        def plan(at_s: float, client: int, what: str) -> None:
            heapq.heappush(events, (at_s, next(numbers), client, what))

        for client in range(self.clients):
            plan(self.clock(), client, "comes")
        while events:
            self.clock.now, _, client, what = heapq.heappop(events)
            if waiting:
                admission.outflow.add(0, self.clock() - since_s)
            since_s = self.clock()
            if what == "ends":
                running -= 1
                self.served.append(client)
            else:
                self.tries[client] += 1
                error = refused(admission, len(waiting))
                if error is None:
                    waiting.append(client)
                else:
                    self.returns.append(self.clock() + error.retry_after_s)
                    plan(self.returns[-1], client, "comes")
            while waiting and running < self.slots:
                running += 1
                plan(self.clock() + self.service_s, waiting.pop(0), "ends")
                admission.outflow.add(1, 0)


@pytest.mark.parametrize("service_s", [0.01, 0.5, 20.0])
@pytest.mark.parametrize(("limit", "slots"), [(1, 1), (8, 2), (64, 16)])
def test_all_of_a_crowd_are_served_that_come_again_when_they_are_told(service_s, limit, slots):
    crowd = Crowd(300, limit, slots, service_s)
    began = crowd.clock()
    crowd.run()
    assert sorted(crowd.served) == list(range(300))
    # The server is not left idle for long, however wrong the first guess of the rate was.
    assert crowd.clock() - began <= 2 * 300 / slots * service_s + 2 * MOST_RETRY_S
    # Not all at once, and not again and again.
    assert max(Counter(round(at_s, 3) for at_s in crowd.returns).values()) <= 300 / 10
    needed_s = 300 / slots * service_s
    assert max(crowd.tries.values()) <= 6 + needed_s / (MOST_RETRY_S / 4)
