"""`make chaos`: the faults of the slow tests at full size. Prints what was seen; ends with 1 if wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.slow import test_pull_kill
from tools.progress import status

SEED = 7


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="downloads that are killed; default: 200")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the moments; default: {SEED}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            with status(f"{options.kills} downloads"):
                outcome = test_pull_kill.chaos(Path(folder), options.kills, options.seed)
        except AssertionError as error:
            print(f"wrong: {error}", file=sys.stderr)
            return 1
    print(
        f"downloads: {outcome.killed} killed at random moments, {outcome.finished} done before; "
        "never a wrong file under a good name, each one resumed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
