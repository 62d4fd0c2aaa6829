"""Draws the curves of a report: `python -m benchmarks.pictures FILE.json DIR`, one SVG for each picture.

The same report gives the same bytes. No background, and colours that can be read on white and on black.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes

INK = "#768390"
COLOURS = ("#2f81f7", "#db6d28", "#8957e5")
MARKERS = ("o", "s", "^")
SIZE_INCHES = (6.4, 3.4)


@dataclass(frozen=True)
class Picture:
    """What stands around the curves."""

    title: str
    x: str
    y: str
    points_only: bool = False
    log_x: bool = False
    log_y: bool = False


PICTURES = {
    "streams": Picture("Throughput: 128 tokens in, 64 out", "streams", "tokens per second", log_x=True),
    "prefix": Picture(
        "First token of requests that arrive in turn, 768 of 800 tokens shared", "request", "seconds"
    ),
    "fairness": Picture(
        "A short request beside long ones of another tenant, 16 slots",
        "long requests",
        "seconds",
        log_x=True,
        log_y=True,
    ),
    "stall": Picture(
        "Pauses of 3 running streams around a prompt of 1,500 tokens",
        "seconds since the prompt was sent",
        "milliseconds since the last text",
        points_only=True,
        log_y=True,
    ),
}


def draw(curves: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes the pictures that have curves, in the form of `Curve.to_json`; tells the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {
        "svg.hashsalt": "bear_grpc",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.titlesize": 11,
        "path.simplify": True,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, picture in PICTURES.items():
        own = [curve for curve in curves if curve["picture"] == name]
        if not own:
            continue
        with matplotlib.rc_context(settings):
            figure, axes = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
            _fill(axes, picture, own)
            files.append(folder / f"{name}.svg")
            figure.savefig(files[-1], transparent=True, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
    return files


def _fill(axes: Axes, picture: Picture, curves: Sequence[Mapping[str, Any]]) -> None:
    for index, curve in enumerate(curves):
        x, y = zip(*curve["points"], strict=True) if curve["points"] else ((), ())
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        style |= {"linestyle": "none", "markersize": 2.5} if picture.points_only else {"markersize": 4}
        axes.plot(x, y, label=curve["name"], **style)
    if picture.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    if picture.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=picture.title, xlabel=picture.x, ylabel=picture.y)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pictures", description="Draws a report's curves."
    )
    parser.add_argument("report", type=Path, metavar="FILE.json")
    parser.add_argument("folder", type=Path, metavar="DIR")
    options = parser.parse_args()
    report = json.loads(options.report.read_text(encoding="utf-8"))
    for file in draw(report.get("curves", []), options.folder):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
