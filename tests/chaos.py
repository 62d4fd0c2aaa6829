"""`make chaos`: the faults of the slow tests at full size. Prints what was seen; ends with 1 if wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.slow import test_pull_kill, test_worker_kill
from tools.progress import status

SEED = 7


def downloads(folder: Path, options: argparse.Namespace) -> str:
    """Downloads that are killed at random moments."""
    outcome = test_pull_kill.chaos(folder, options.kills, options.seed)
    return (
        f"{outcome.killed} killed at random moments, {outcome.finished} done before; "
        "never a wrong file under a good name, each one resumed"
    )


def workers(folder: Path, options: argparse.Namespace) -> str:
    """Workers that are killed at random moments."""
    outcome = test_worker_kill.chaos(folder, options.rounds, options.seed)
    times = sorted(outcome.recovery_s)
    return (
        f"{outcome.deaths} killed at random moments under {outcome.streams} streams, "
        f"{outcome.cut} of them not done; "
        f"each ended with its whole text, {outcome.excused} by the tie rule; an answer again after "
        f"{times[len(times) // 2]:.2f} s (median), {times[-1]:.2f} s (longest)"
    )


TYPES: dict[str, Callable[[Path, argparse.Namespace], str]] = {"downloads": downloads, "workers": workers}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"of {', '.join(TYPES)}; default: all")
    parser.add_argument("--kills", type=int, default=200, help="downloads that are killed; default: 200")
    parser.add_argument("--rounds", type=int, default=200, help="workers that are killed; default: 200")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the moments; default: {SEED}")
    options = parser.parse_args()
    unknown = [name for name in options.types if name not in TYPES]
    if unknown:
        parser.error(f"there is no {unknown[0]!r}")
    wrong = 0
    for name in options.types or TYPES:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            try:
                with status(name):
                    told = TYPES[name](Path(folder), options)
            except AssertionError as error:
                print(f"{name}: wrong: {error}", file=sys.stderr)
                wrong = 1
            else:
                print(f"{name}: {told}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
