"""A client in a process of its own: reads one generation and tells when its tokens came.

The process that measures runs nothing meanwhile. `measure` starts it, `python -m benchmarks.stream` is it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.cache import SetupError

BOS = 1
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Reading:
    """One greedy generation as its client saw it."""

    tokens: int
    deltas: int
    ttft_s: float
    first_to_last_s: float
    server_tokens_per_second: float

    @property
    def tokens_per_second(self) -> float:
        """From the first delta to the last; the first token is not counted, as its time is not."""
        return (self.tokens - 1) / self.first_to_last_s


def measure(target: str, model: str, tokens: int) -> Reading:
    """Reads from our server at a gRPC target, or from llama-server at `http://HOST:PORT`.

    Raises:
        SetupError: the client failed.
    """
    command = [sys.executable, "-m", "benchmarks.stream", target, model, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"the client ended with {done.returncode}: {done.stderr[-500:]}")
    return Reading(**json.loads(done.stdout))


def _over_grpc(target: str, model: str, tokens: int) -> tuple[float, list[float], int, float]:
    from bear_grpc.client import Client

    times: list[float] = []
    completed = None
    with Client(target) as client:
        client.health()  # the connection is not what is measured
        start = time.perf_counter()
        events = client.generate(
            model,
            token_ids=[BOS],
            max_tokens=tokens,
            temperature=0.0,
            repetition_penalty=1.0,
            ignore_eos=True,
        )
        for event in events:
            if event.HasField("delta"):
                times.append(time.perf_counter())
            elif event.HasField("completed"):
                completed = event.completed
    if completed is None:
        raise SetupError("the generation did not end")
    rate = completed.timings.decode_tokens_per_second
    return start, times, completed.usage.completion_token_count, rate


def _over_http(host: str, tokens: int) -> tuple[float, list[float], int, float]:
    asked = {"prompt": [BOS], "n_predict": tokens, "stream": True, "temperature": 0, "ignore_eos": True}
    asked["cache_prompt"] = False
    times: list[float] = []
    last: dict[str, float] = {}
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
    connection.connect()
    start = time.perf_counter()
    connection.request("POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if event.get("content"):
            times.append(time.perf_counter())
        if event.get("stop"):
            last = event["timings"]
    connection.close()
    if not last:
        raise SetupError("the generation did not end")
    return start, times, int(last["predicted_n"]), last["predicted_per_second"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream")
    parser.add_argument("target")
    parser.add_argument("model")
    parser.add_argument("tokens", type=int)
    options = parser.parse_args()
    if options.target.startswith("http://"):
        found = _over_http(options.target.removeprefix("http://"), options.tokens)
    else:
        found = _over_grpc(options.target, options.model, options.tokens)
    start, times, tokens, rate = found
    if len(times) < 2:
        raise SetupError("the generation brought no text")
    print(json.dumps(Reading(tokens, len(times), times[0] - start, times[-1] - times[0], rate).__dict__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
