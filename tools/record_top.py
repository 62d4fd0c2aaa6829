"""Draws what `bear top` shows of a busy server as docs/top.svg."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bear_grpc.cli.top import picture
from bear_grpc.client import Client

PICTURE = Path(__file__).parent.parent / "docs" / "top.svg"
COLUMNS = 80
MODEL = "bear-demo"
REQUESTS = 6
START_TIMEOUT_S = 60.0
READINGS = 4


def main() -> None:
    """Runs a server with requests, and writes what one reading of it shows."""
    with tempfile.TemporaryDirectory() as name:
        address = f"unix:{name}/bear.sock"
        command = [sys.executable, "-m", "bear_grpc.cli", "serve", "--listen", address, "--models-dir", name]
        command += ["--state-dir", name]
        process = subprocess.Popen([*command, "--load", MODEL])
        try:
            with Client(address) as client:
                client.wait_until_serving(timeout=START_TIMEOUT_S)
                drawing = _drawing(client)
        finally:
            process.terminate()
            process.wait()
    PICTURE.write_text(drawing)
    print(f"wrote {PICTURE.name}")


def _drawing(client: Client) -> str:
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            client.generate_once(MODEL, messages=[{"role": "user", "content": "Tell me of bears."}])

    asking = [threading.Thread(target=ask) for _ in range(REQUESTS)]
    for thread in asking:
        thread.start()
    try:
        *_, reading = itertools.islice(client.watch_load(1.0), READINGS)
        shown = picture(
            reading.load, [model for model in client.list_models() if model.name == MODEL], COLUMNS
        )
    finally:
        ended.set()
        for thread in asking:
            thread.join()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ bear top", style="bold"))
    console.print(shown)
    drawing = console.export_svg(title="bear_grpc", unique_id="top")
    # The picture must not fetch fonts from anywhere: the viewer's monospace font does.
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)
    return re.sub(r"<!-- .*? -->\s*", "", drawing, flags=re.DOTALL)


if __name__ == "__main__":
    main()
