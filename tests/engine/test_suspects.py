"""While native code works, the page names for whom; between steps it names nobody."""

from __future__ import annotations

import os

from bear_grpc.engine.engine import Engine
from bear_grpc.suspects import Suspects, SuspectsPage, create
from tests.engine.harness import Harness


def test_the_sequences_of_a_step_are_marked_while_it_runs_and_not_after_it():
    fd = create()
    page = SuspectsPage(fd)
    os.close(fd)
    harness = Harness(max_sequences=2)
    backend = harness.backend
    harness.engine = Engine(backend, clock=harness.clock, emit=lambda step: None, mark=page.mark_step)
    seen: list[Suspects] = []
    backend.during = lambda: seen.append(page.read())
    make, drawn = backend.logits, []
    backend.logits = lambda row: drawn.append(page.read()) or make(row)
    for id in (3, 4, 5):
        harness.submit(id, "ab", max_tokens=2)
    while harness.engine.step():
        assert page.read() == Suspects()
    assert {id for marked in seen for id in marked.sequences} == {3, 4, 5}
    assert len(seen[0].sequences) == 2
    assert all(marked.sequences for marked in drawn)
    page.close()
