"""The bare loop: what llama.cpp gives a Python program that does nothing else.

One sequence, greedy, over the low-level API, with every array made before the clock starts. It stands
between llama-bench (the same loop in C++, without choosing tokens) and the server: what the server loses
against it is the server's own. Runs in a child: `measure` starts it, `python -m benchmarks.loops` is it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cache import SetupError

BOS = 1

LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# The binding prints all that llama.cpp says. Kept for as long as the process lives.
_SILENT = LOG_CALLBACK(lambda level, text, data: None)


def measure(model: Path, tokens: int, threads: int, *, repack: bool) -> float:
    """Tokens per second of the bare loop, in a process of its own.

    Raises:
        SetupError: the process failed.
    """
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.loops", model, "--tokens", str(tokens)]
    command += ["--threads", str(threads), *([] if repack else ["--no-repack"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"the bare loop ended with {done.returncode}: {done.stderr[-500:]}")
    return float(json.loads(done.stdout)["tokens_per_second"])


def _open(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """A model with its context, and the size of its vocabulary."""
    import llama_cpp.llama_cpp as lib

    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.use_extra_bufts = not options.no_repack
    model = lib.llama_model_load_from_file(str(options.model).encode(), model_params)
    if model is None:
        raise SetupError(f"llama.cpp cannot load {options.model}")
    params = lib.llama_context_default_params()
    params.n_ctx = options.tokens + 1
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = options.threads
    context = lib.llama_init_from_model(model, params)
    if context is None:
        raise SetupError("llama.cpp gave no context")
    return lib, context, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))


def run(options: argparse.Namespace) -> dict[str, float]:
    """From the first token to the last, as the client of a server sees it."""
    lib, context, n_vocab = _open(options)
    batch = lib.llama_batch_init(1, 0, 1)
    batch.n_tokens = 1
    batch.n_seq_id[0] = 1
    batch.seq_id[0][0] = 0
    batch.logits[0] = 1
    get_logits = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("llama_get_logits", lib._lib))
    row = ctypes.c_float * n_vocab

    def step(token: int, position: int) -> int:
        batch.token[0], batch.pos[0] = token, position
        if lib.llama_decode(context, batch):
            raise SetupError("llama_decode failed")
        logits: Any = row.from_address(get_logits(context))
        return int(np.frombuffer(logits, np.float32).argmax())

    for position in range(4):  # faults the weights in
        step(BOS, position)
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    token = step(BOS, 0)
    start = time.perf_counter()
    for position in range(1, options.tokens):
        token = step(token, position)
    seconds = time.perf_counter() - start
    return {"tokens_per_second": (options.tokens - 1) / seconds, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops")
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-repack", action="store_true")
    print(json.dumps(run(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
