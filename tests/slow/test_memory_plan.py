"""The memory plan against what real workers hold: their proportional set size after a first generation.

`llama` and `jamba` were used while the plan's constants were found, `gemma2` for its compute buffers, and
`qwen3moe` for nothing: it tells whether the plan knows models that it was not made from.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bear_grpc
from bear_grpc.executor.executor import ModelExecutor
from bear_grpc.executor.limits import ExecutorLimits
from bear_grpc.executor.probe import probe
from bear_grpc.executor.share import CpuShare
from bear_grpc.executor.spawner import Spawner
from bear_grpc.models.gguf import read_header
from bear_grpc.models.memory import plan
from bear_grpc.params import SamplingParams, StopParams, TokensInput
from bear_grpc.types import KvCacheType, LoadOptions
from tests.helpers.large_ggufs import Large, write_large

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

DEMO = Path(bear_grpc.__file__).parent / "demo" / "bear-demo.gguf"
CORES, SEQUENCES, MOST_PROMPT_TOKENS = 2, 4, 600
BAR = 0.10
SMALL_ERROR_BYTES = 16 << 20
"""For models so small that the worker's own memory is most of it."""

MODELS = {
    "llama": (Large("llama", 12, 1024, 16, 4, 4096), "Q8_0"),
    "llama, rearranged": (Large("llama", 16, 1024, 16, 4, 4096), "Q4_0"),
    "gemma2": (Large("gemma2", 8, 1024, 8, 4, 3072, head_length=128, window=512, tied=True), "F16"),
    "qwen3moe": (Large("qwen3moe", 8, 768, 12, 4, 768, head_length=128, experts=12), "Q8_0"),
    "jamba": (Large("jamba", 12, 1024, 16, (0, 0, 0, 4) * 3, 3072, state=16), "Q8_0"),
}
CONTEXTS = (512, 2048, 8192)
KV_TYPES = (KvCacheType.F16, KvCacheType.Q8_0)
CASES = [
    *(
        (model, context, kind)
        for model in ("llama, rearranged", "gemma2", "qwen3moe")
        for context in CONTEXTS
        for kind in KV_TYPES
    ),
    ("llama", 2048, KvCacheType.F16),
    ("jamba", 2048, KvCacheType.F16),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("large")


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    made = Spawner()
    yield made
    made.close()
    made.join()


async def held_bytes(spawner: Spawner, path: Path, options: LoadOptions) -> int:
    """What a worker holds that has loaded the model and generated once."""
    executor = ModelExecutor(
        "measured",
        spawner=spawner,
        share=CpuShare(),
        limits=ExecutorLimits(),
        on_progress=lambda _: None,
        on_costs=lambda _: None,
        on_crash=lambda _: False,
    )
    ready = await executor.load(path, options, CORES)
    try:
        assert ready.options.context_length is not None
        tokens = min(MOST_PROMPT_TOKENS, ready.options.context_length - 16)
        generation = executor.generate(
            TokensInput([5 + place % 300 for place in range(tokens)]),
            SamplingParams(),
            StopParams(max_tokens=8, ignore_eos=True),
        )
        try:
            async for _ in generation:
                pass
        finally:
            generation.close()
        return executor.memory_bytes
    finally:
        await executor.stop()


async def compare(spawner: Spawner, path: Path, options: LoadOptions) -> tuple[int, int, int]:
    """Planned bytes from the header alone, planned bytes with a dry run, and those held."""
    header = read_header(path)
    found = await probe(spawner, path, options, CORES)
    plans = [plan(header, options, found.devices, cores=CORES, dry_run=dry) for dry in (None, found.dry_run)]
    assert plans[0].options == plans[1].options
    held = await held_bytes(spawner, path, options)
    return plans[0].devices[0].needed_bytes, plans[1].devices[0].needed_bytes, held


@pytest.mark.parametrize(("model", "context", "kind"), CASES, ids=str)
def test_plan_is_within_a_tenth_of_what_the_worker_holds(
    spawner: Spawner, folder: Path, model: str, context: int, kind: KvCacheType
) -> None:
    made, dtype = MODELS[model]
    path = folder / f"{model}.gguf"
    if not path.exists():
        write_large(path, made, dtype)
    options = LoadOptions(
        context_length=context, max_sequences=SEQUENCES, kv_cache_type=kind, repack="rearranged" in model
    )
    formula, dry, held = asyncio.run(compare(spawner, path, options))
    mib = 2**20
    print(
        f"| {model} {dtype} | {context} | {kind.value} | {held / mib:.1f} "
        f"| {formula / mib:.1f} ({formula / held - 1:+.1%}) | {dry / mib:.1f} ({dry / held - 1:+.1%}) |"
    )
    assert held > 200 * mib
    assert abs(dry - held) <= BAR * held
    assert abs(formula - held) <= BAR * held


def test_plan_of_a_small_model_is_near(spawner: Spawner) -> None:
    if not DEMO.exists():
        pytest.skip("the demo model is not built")
    options = LoadOptions(max_sequences=SEQUENCES, repack=False)
    formula, dry, held = asyncio.run(compare(spawner, DEMO, options))
    mib = 2**20
    print(f"| bear-demo | 2048 | f16 | {held / mib:.1f} | {formula / mib:.1f} | {dry / mib:.1f} |")
    assert abs(dry - held) <= SMALL_ERROR_BYTES
    assert abs(formula - held) <= SMALL_ERROR_BYTES
