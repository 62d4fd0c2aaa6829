"""`python -m benchmarks [BAR ...]`: measures, prints a report, ends with 1 if a limit does not hold."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from pathlib import Path

from benchmarks import machine, pictures, report
from benchmarks.bars import all_bars
from benchmarks.cache import SetupError
from benchmarks.measure import Curve, Plan, Row
from benchmarks.others import QUIET_CORES

OUT = Path("build/benchmarks")


def main() -> int:
    bars = all_bars()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures the server against llama.cpp's own programs, on this machine, in one run. "
        "Models and the peer's programs are made on first use, which takes minutes.",
    )
    parser.add_argument("bars", nargs="*", metavar="BAR", help=f"{', '.join(bars)}; without any, all of them")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: shows that it works, no figures")
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="do not wait until the machine is quiet: for what is measured in turn, in many rounds",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="measure so many times")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=OUT / "report.json", help=f"default: {OUT}/report.json"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", default=OUT, help=f"for the SVG files; default: {OUT}"
    )
    parser.add_argument("--list", action="store_true", help="list the bars and end")
    options = parser.parse_args()
    if options.list:
        for bar in bars.values():
            print(f"{bar.name:12} {bar.title}")
        return 0
    unknown = [name for name in options.bars if name not in bars]
    if unknown:
        parser.error(f"there is no bar {unknown[0]!r}: {', '.join(bars)}")
    # Servers and clients end with the blocks that hold them: a signal must leave those blocks.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    plan = Plan(options.quick, options.rounds, options.at_once)
    return measure(options.bars or list(bars), plan, options.json, options.pictures)


def measure(names: list[str], plan: Plan, json_file: Path, folder: Path) -> int:
    """Runs the bars in order; a bar that cannot be set up does not keep the others from running."""
    bars = all_bars()
    head = machine.describe()
    rows: list[Row] = []
    curves: list[Curve] = []
    failed = False
    for name in names:
        try:
            for result in bars[name].run(plan):
                rows.append(result) if isinstance(result, Row) else curves.append(result)
        except SetupError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            failed = True
        except Exception:
            # The other bars have taken minutes or will: their figures are not lost with this one.
            print(f"error: {name}:\n{traceback.format_exc()}", file=sys.stderr)
            failed = True
    head["others"] = f"used up to {plan.others:.2f} cores during a measurement, {plan.repeated} were repeated"
    if plan.others > QUIET_CORES:
        head["others"] += ": THE MACHINE WAS NOT QUIET, do not trust the figures"
    report.show(head, rows)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(json_file, head, rows, curves)
    pictures.draw([curve.to_json() for curve in curves], folder)
    print(f"written: {json_file}, pictures in {folder}")
    return 1 if failed or any(row.limit is not None and not row.limit.holds for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
