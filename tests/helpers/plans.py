"""A header as a small model has it, made of numbers, and devices to plan its load for."""

from __future__ import annotations

from bear_grpc.models.gguf_types import ArraySummary, GgufHeader, MetadataValue, TensorInfo
from bear_grpc.models.memory import MemoryPlan, plan
from bear_grpc.protocol import DeviceInfo, DryRun
from bear_grpc.types import LoadOptions

GIB = 2**30
LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 4, 64, 4, 2, 128, 1000
ROW_VALUES = KV_HEADS * 2 * (WIDTH // HEADS)
HOST = DeviceInfo("CPU", "", "cpu", 8 * GIB, 16 * GIB)
OPTIONS = LoadOptions(context_length=512, max_sequences=2, repack=False)


def gpu(free_bytes: int, name: str = "CUDA0") -> DeviceInfo:
    return DeviceInfo(name, "", "gpu", free_bytes, free_bytes)


def made_header(
    architecture: str = "llama", *, kind: str = "Q8_0", is_tied: bool = False, **changes: MetadataValue | None
) -> GgufHeader:
    """A small model's; `changes` are keys of its architecture with `__` for the point, None takes one out."""
    numbers: dict[str, MetadataValue | None] = {
        "block_count": LAYERS,
        "embedding_length": WIDTH,
        "context_length": 4096,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    metadata: dict[str, MetadataValue] = {
        f"{architecture}.{name}": value for name, value in numbers.items() if value is not None
    }
    metadata["general.architecture"] = architecture
    metadata["tokenizer.ggml.tokens"] = ArraySummary("string", VOCABULARY)
    shapes = {"token_embd.weight": (WIDTH, VOCABULARY)}
    for layer in range(LAYERS):
        shapes[f"blk.{layer}.attn_norm.weight"] = (WIDTH,)
        shapes[f"blk.{layer}.ffn_up.weight"] = (WIDTH, FEED_FORWARD)
    if not is_tied:
        shapes["output.weight"] = (WIDTH, VOCABULARY)
    tensors, offset = [], 0
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        type_name, size = (kind, count) if len(shape) > 1 else ("F32", 4 * count)
        tensors.append(TensorInfo(name, type_name, shape, count, offset, size))
        offset += size
    return GgufHeader(3, metadata, tuple(tensors), 0, 32, offset)


EMBEDDINGS = WIDTH * VOCABULARY
LAYER_WEIGHTS = 4 * WIDTH + WIDTH * FEED_FORWARD
ALL_WEIGHTS = 2 * EMBEDDINGS + LAYERS * LAYER_WEIGHTS


def planned(
    of: GgufHeader | None = None,
    asked: LoadOptions = OPTIONS,
    *devices: DeviceInfo,
    dry_run: DryRun | None = None,
) -> MemoryPlan:
    return plan(of or made_header(), asked, devices or (HOST,), cores=2, dry_run=dry_run)


def kv_bytes(of: GgufHeader, asked: LoadOptions = OPTIONS) -> int:
    return planned(of, asked).devices[0].kv_cache_bytes
