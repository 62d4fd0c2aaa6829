"""A server process, a real gRPC channel to it, one question, a clean stop."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bear_grpc.client import Client
from bear_grpc.v1 import types_pb2
from bear_grpc.v1.inference_service_pb2 import Completed

MODEL = "bear-demo"
QUESTION = "What is GGUF?"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0

console = Console(highlight=False)


def _free_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    """A server process of its own on loopback; its log is shown if it fails."""
    address = _free_address()
    command = [sys.executable, "-m", "bear_grpc.cli", "serve", "--listen", address]
    with (folder / "server.log").open("w+") as log:
        process = subprocess.Popen([*command, "--models-dir", str(folder)], stderr=log)
        try:
            yield address
        except BaseException:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
            log.seek(0)
            console.print("the server said:", log.read(), markup=False, style="red")
            raise
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_TIMEOUT_S)
        console.print(f"[dim]server[/dim]    stopped, exit code {code}")
        if code:
            raise SystemExit(code)


def _answer(client: Client) -> Completed:
    """Prints the answer token by token."""
    console.print(f"[dim]question[/dim]  {QUESTION}")
    console.print("[dim]answer[/dim]    ", end="")
    completed = Completed()
    with client.generate(MODEL, messages=[{"role": "user", "content": QUESTION}]) as events:
        for event in events:
            if event.HasField("delta"):
                console.out(event.delta.text, end="", highlight=False)
                console.file.flush()
            elif event.HasField("completed"):
                completed = event.completed
    console.print()
    return completed


def _models(client: Client) -> Table:
    table = Table("model", "state", "size", "quantization", "context", box=None, header_style="dim")
    for model in client.list_models():
        state = types_pb2.ModelState.Name(model.status.state).removeprefix("MODEL_STATE_").lower()
        size = f"{model.size_bytes / 2**20:.1f} MiB"
        table.add_row(model.name, state, size, model.quantization, str(model.context_length))
    return table


def main() -> None:
    """Runs the demonstration."""
    with (
        tempfile.TemporaryDirectory(prefix="bear-demo-") as folder,
        _server(Path(folder)) as address,
        Client(address) as client,
    ):
        client.wait_until_serving(timeout=START_TIMEOUT_S)
        console.print(f"[dim]server[/dim]    {address}, health SERVING")
        completed = _answer(client)
        usage, timings = completed.usage, completed.timings
        console.print(
            f"[dim]figures[/dim]   {usage.completion_token_count} tokens, "
            f"{timings.decode_tokens_per_second:.0f} tokens/s, "
            f"TTFT {timings.ttft_seconds * 1000:.0f} ms (loading the model included)"
        )
        health = client.health(f"models/{MODEL}").status
        console.print(f"[dim]health[/dim]    models/{MODEL} {'SERVING' if health == 1 else health}")
        console.print(_models(client))


if __name__ == "__main__":
    main()
