"""Milliseconds of one llama_decode by its rows and by what it looks back at, and of a copy of a state.

Why prompts are read in runs of 64 tokens: llama.cpp's attention works in tiles of 64 rows on CPUs. In a
process of its own, on plain weights, one sequence in a part of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import models
from benchmarks.cache import SetupError
from benchmarks.measure import Plan, Row, Series
from tools.progress import status

NAME = "tiles"
MODEL = "tinyllama"
LOOK_BACK = (0, 1400)
ROWS = (1, 2, 16, 32, 63, 64, 128)
COPIED = 768
REPEATS = 3


def run(plan: Plan) -> Iterator[Row]:
    command = [sys.executable, "-m", "benchmarks.bars.tiles", str(models.get(plan.model(MODEL)))]
    with status(f"{NAME}: steps of {min(ROWS)} to {max(ROWS)} tokens"):
        done = plan.undisturbed(lambda: subprocess.run(command, capture_output=True, text=True, check=False))
    if done.returncode:
        raise SetupError(f"the steps ended with {done.returncode}: {done.stderr[-500:]}")
    for what, times in json.loads(done.stdout).items():
        yield Row(NAME, what, "ms", Series(times))


def main() -> int:
    import numpy as np

    from bear_grpc.backend import llama, native
    from bear_grpc.backend.base import Batch, Outcome
    from bear_grpc.config import available_cores
    from bear_grpc.types import LoadOptions

    native.start()
    backend = llama.LlamaBackend(
        Path(sys.argv[1]),
        LoadOptions(max_sequences=2, context_length=2048, repack=False, kv_unified=False),
        cores=available_cores(),
        report=lambda stage, fraction: None,
    )
    rng = np.random.default_rng(0)
    batch = Batch(max(ROWS))

    def step(start: int, count: int) -> float:
        batch.clear()
        batch.extend(0, start, rng.integers(300, 30_000, count).tolist(), True)
        began = time.perf_counter()
        if backend.forward(batch) is not Outcome.DONE:
            raise SetupError("llama_decode failed")
        return (time.perf_counter() - began) * 1000

    found: dict[str, list[float]] = {}
    for look_back in LOOK_BACK:
        backend.kv_remove(0, 0)
        for start in range(0, look_back, 100):
            step(start, 100)
        for rows in ROWS:
            times = []
            for _ in range(REPEATS):
                backend.kv_remove(0, look_back)
                times.append(step(look_back, rows))
            found[f"{rows} tokens after {look_back:,}"] = times
    backend.kv_remove(0, COPIED)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        backend.kv_copy(0, 1, COPIED)
        times.append((time.perf_counter() - began) * 1000)
        backend.kv_remove(1, 0)
    found[f"copy of a state of {COPIED} tokens"] = times
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
