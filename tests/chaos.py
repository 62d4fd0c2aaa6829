"""`make chaos`: the faults of the slow tests at full size. Prints what was seen; ends with 1 if wrong."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers import worker_kills
from tests.slow import test_cancels, test_crowd, test_fuzz, test_mutants, test_pull_kill, test_worker_kill
from tools.progress import status

SEED = 7


@dataclasses.dataclass(frozen=True)
class Round:
    """One kind of fault: so many of `unit`; `run` tells what was seen, and raises AssertionError."""

    count: int
    unit: str
    run: Callable[[Path, int, int], str]


def downloads(folder: Path, count: int, seed: int) -> str:
    outcome = test_pull_kill.chaos(folder, count, seed)
    return (
        f"{outcome.killed} killed at random moments, {outcome.finished} done before; "
        "never a wrong file under a good name, each one resumed"
    )


def requests(folder: Path, count: int, seed: int) -> str:
    outcome = test_fuzz.fuzz(folder, count, seed)
    assert outcome.reached_share >= test_fuzz.LEAST_REACHED, f"{outcome.reached_share:.0%} were computed"
    codes = ", ".join(f"{number} {code}" for code, number in outcome.codes.most_common())
    return f"{codes}; {outcome.reached} of {outcome.generations} generations computed; no worker died"


def models(folder: Path, count: int, seed: int) -> str:
    outcome = asyncio.run(test_mutants.chaos(folder, count, seed))
    loads = ", ".join(f"{number} {reason}" for reason, number in outcome.loads.most_common())
    answers = ", ".join(f"{number} {reason}" for reason, number in outcome.answers.most_common())
    return f"loads: {loads}; answers: {answers}; no worker is left"


def streams(folder: Path, count: int, seed: int) -> str:
    outcome = asyncio.run(test_crowd.chaos(folder, count, seed))
    ttft = (
        f"{outcome.percentile(50):.2f} s in the median, {outcome.percentile(99):.2f} s at the 99th percentile"
    )
    return (
        f"up to {outcome.most_running} running together; each got its own answer, {outcome.same_tokens} "
        f"of them token for token, {outcome.excused} by the tie rule; first token after {ttft}"
    )


def cancels(folder: Path, count: int, seed: int) -> str:
    outcome = asyncio.run(test_cancels.chaos(folder, count, seed))
    return (
        f"{outcome.left} clients left before their answer was whole, {outcome.ended} after; the server "
        f"grew by {outcome.grown_bytes / 1e6:.2f} MB after the first tenth; no slot, file or thread is left"
    )


def workers(folder: Path, count: int, seed: int) -> str:
    outcome = test_worker_kill.chaos(folder, count, seed)
    seen = (
        f"{outcome.deaths} ended or stopped at random moments under {outcome.streams} streams, "
        f"{outcome.cut} of them not done; "
        f"each ended with its whole text, {outcome.excused} by the tie rule; an answer again after "
        f"{_told(outcome.recovery_s)}; with a heartbeat timeout of "
        f"{worker_kills.HEARTBEAT_TIMEOUT_S:g} s the {len(outcome.stopped_s)} stopped ones answer after "
        f"{_told(outcome.stopped_s)}; the 99th percentile of the pauses between the tokens of another "
        f"model is {outcome.pauses()}"
    )
    assert not outcome.beyond_bars(), f"{', '.join(outcome.beyond_bars())}; {seen}"
    return seen


def _told(times: list[float]) -> str:
    """Seconds: the middle and the longest."""
    return f"{sorted(times)[len(times) // 2]:.2f} s (median), {max(times):.2f} s (longest)" if times else "-"


ROUNDS = {
    "streams": Round(1_000, "streams at once", streams),
    "downloads": Round(200, "downloads killed", downloads),
    "workers": Round(200, "workers ended or stopped", workers),
    "cancels": Round(5_000, "clients that leave", cancels),
    "requests": Round(10_000, "requests of any kind", requests),
    "models": Round(300, "spoiled models", models),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    named = ", ".join(f"{name} ({one.count:,} {one.unit})" for name, one in ROUNDS.items())
    parser.add_argument("rounds", nargs="*", metavar="ROUND", help=f"{named}; default: all")
    parser.add_argument("--part", type=float, default=1.0, help="of the full size; default: 1")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of all that is random; default: {SEED}")
    options = parser.parse_args()
    unknown = sorted(set(options.rounds) - set(ROUNDS))
    if unknown:
        parser.error(f"no round is named {', '.join(unknown)}; there are {', '.join(ROUNDS)}")
    failed = False
    for name in options.rounds or ROUNDS:
        one = ROUNDS[name]
        count = max(1, round(one.count * options.part))
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            try:
                with status(f"{name}: {count:,} {one.unit}"):
                    seen = one.run(Path(folder), count, options.seed)
            except AssertionError as error:
                failed = True
                print(f"{name}: wrong: {error}", file=sys.stderr)
                continue
        print(f"{name} ({count:,} {one.unit}, {time.monotonic() - began:.0f} s): {seen}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
