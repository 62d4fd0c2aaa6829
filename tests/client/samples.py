"""Messages as a server sends them, for the fake server and for tests of what is shown of them."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import types_pb2 as types

MIB = 1 << 20

READY = types.ModelStatus(
    name="bear-demo",
    state=types.MODEL_STATE_READY,
    effective_options=types.LoadOptions(context_length=2048, max_sequences=4, threads=2, repack=False),
    memory=types.MemoryLedger(weights_bytes=10 << 20, kv_cache_bytes=2 << 20, compute_bytes=1 << 20),
    running_count=1,
    kv_cache_used_token_count=820,
    kv_cache_token_count=8192,
    kv_cache_idle_token_count=80,
    counters=types.EngineCounters(
        prefill_token_count=33, cached_token_count=22, decode_token_count=44, preemption_count=5
    ),
)
DEMO = types.Model(
    name="bear-demo",
    aliases=["demo"],
    description="a small [bold]model[/bold]",
    source=types.ModelSource(embedded=types.EmbeddedSource()),
    size_bytes=10 << 20,
    parameter_count=124_000_000,
    quantization="Q8_0",
    context_length=4096,
    capabilities=[types.MODEL_CAPABILITY_GENERATE, types.MODEL_CAPABILITY_CHAT],
    status=READY,
    cost_tables=[
        types.CostTable(repack=True, threads=2, costs=[types.StepCost(token_count=1, seconds=0.024)]),
        types.CostTable(
            repack=False,
            threads=2,
            costs=[
                types.StepCost(token_count=1, seconds=0.027),
                types.StepCost(token_count=16, seconds=0.1304),
            ],
        ),
    ],
)
PLAIN = types.Model(
    name="plain",
    capabilities=[types.MODEL_CAPABILITY_GENERATE],
    status=types.ModelStatus(name="plain", state=types.MODEL_STATE_AVAILABLE),
)
COMPLETED = inference.Completed(
    finish_reason=inference.FINISH_REASON_STOP,
    usage=inference.Usage(prompt_token_count=7, completion_token_count=3),
    timings=inference.Timings(ttft_seconds=0.052, decode_tokens_per_second=92.08),
)

LOADING = types.ModelStatus(
    name="bear-demo",
    state=types.MODEL_STATE_LOADING,
    load_progress=types.LoadProgress(stage=types.LOAD_STAGE_WEIGHTS, fraction=0.45),
)
HALFWAY = types.PullProgress(
    stage=types.PULL_STAGE_DOWNLOADING,
    completed_bytes=320 * MIB,
    total_bytes=640 * MIB,
    bytes_per_second=12.5 * MIB,
    remaining_seconds=25.6,
)
TINY_SOURCE = types.HubSource(repo_id="owner/tiny-GGUF", file="tiny.Q4_K_M.gguf", revision="main")
# In the catalog, not here.
TINY = types.Model(
    name="tiny",
    source=types.ModelSource(hub=TINY_SOURCE),
    size_bytes=640 * MIB,
    quantization="Q4_K_M",
    context_length=2048,
    status=types.ModelStatus(name="tiny", state=types.MODEL_STATE_ABSENT),
)
# The same, on its way here.
COMING = types.Model(
    name="coming",
    size_bytes=640 * MIB,
    status=types.ModelStatus(name="coming", state=types.MODEL_STATE_ABSENT, pull=HALFWAY),
)
TINY_PULLED = types.Model(
    name="tiny",
    size_bytes=640 * MIB,
    sha256="0123456789abcdef" * 4,
    status=types.ModelStatus(name="tiny", state=types.MODEL_STATE_AVAILABLE),
)


def pulling(
    stage: types.PullStage.ValueType, completed_mib: int, total_mib: int = 640
) -> models.PullModelResponse:
    """A step of a download."""
    return models.PullModelResponse(
        progress=types.PullProgress(
            stage=stage, completed_bytes=completed_mib * MIB, total_bytes=total_mib * MIB
        )
    )


PULL_STARTED = models.PullModelResponse(
    started=models.PullStarted(
        name="tiny", source=TINY_SOURCE, sha256=TINY_PULLED.sha256, total_bytes=640 * MIB
    )
)
PULL_COMPLETED = models.PullModelResponse(completed=models.PullCompleted(model=TINY_PULLED))
# A whole download.
PULLED = [
    pulling(types.PULL_STAGE_QUEUED, 0, 0),
    PULL_STARTED,
    pulling(types.PULL_STAGE_DOWNLOADING, 0),
    models.PullModelResponse(progress=HALFWAY),
    models.PullModelResponse(
        verifying=models.PullVerifying(completed_bytes=600 * MIB, total_bytes=640 * MIB)
    ),
    PULL_COMPLETED,
]
METADATA = [
    models.MetadataEntry(key="general.name", string_value="demo"),
    models.MetadataEntry(key="tokenizer.chat_template", string_value="{{ messages }}\n"),
    models.MetadataEntry(
        key="tokenizer.ggml.tokens",
        array_value=models.MetadataArray(element_type="string", element_count=32_000),
    ),
]
TENSORS = [models.TensorInfo(name="output.weight", type="Q6_K", shape=[2048, 32_000], size_bytes=50 * MIB)]
MIX = [
    models.TensorTypeShare(type="Q4_K", tensor_count=134, parameter_count=10**9, size_bytes=540 * MIB),
    models.TensorTypeShare(type="F32", tensor_count=45, parameter_count=92_000, size_bytes=60 * MIB),
]
PRUNABLE = [
    models.PrunedFile(path="partial/0123.part", size_bytes=300 * MIB),
    models.PrunedFile(path="blobs/4567", size_bytes=100 * MIB),
]
ESTIMATE = models.EstimateMemoryResponse(
    devices=[
        models.DeviceMemory(
            device="CPU",
            weights_bytes=638 * MIB,
            kv_cache_bytes=44 * MIB,
            compute_bytes=66 * MIB,
            overhead_bytes=150 * MIB,
            needed_bytes=898 * MIB,
            free_bytes=5 << 30,
        )
    ],
    fits=True,
    effective_options=types.LoadOptions(context_length=2048, gpu_layers=0, keep_alive=Duration(seconds=300)),
)
