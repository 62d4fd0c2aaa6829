"""Draws a run of `make demo` as docs/demo.svg, the picture in the README."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parent.parent / "docs" / "demo.svg"
COLUMNS = 92


def main() -> None:
    """Runs the demonstration and writes what it shows."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "-m", "bear_grpc.demo"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ make demo", style="bold"))
    console.print(Text.from_ansi(run.stdout))
    drawing = console.export_svg(title="bear_grpc", unique_id="demo")
    # The picture must not fetch fonts from anywhere: the viewer's monospace font does.
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"<!-- .*? -->\s*", "", drawing, flags=re.DOTALL)
    PICTURE.write_text(drawing)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
