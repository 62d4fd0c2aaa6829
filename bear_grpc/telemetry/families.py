"""Every metric: its name, what it tells, its labels.

Names are OpenTelemetry's of generative AI, as Prometheus writes them, where it has one; else `bear_*`.
Labels have few values: models that the server knows, methods that it serves, codes and reasons of ours.
"""

from __future__ import annotations

from .series import Kind, Metric

MODEL = ("model",)
# OpenTelemetry's labels, and its bounds with finer ones below and longer ones above: small models are
# faster than those of its advice, and a CPU is slower.
GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
PROVIDER = "bear_grpc"
_FIRST_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WHOLE_S = tuple(0.01 * 2**power for power in range(0, 18, 1))
_QUEUE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_GAP_S = (*_TOKEN_S, 5.0, 10.0, 30.0)
_RATE = tuple(float(rate) for rate in (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000))
_PREFILL_RATE = (*_RATE, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0)
_TOKENS = tuple(float(4**power) for power in range(13))


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, help, labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, help, labels)


def _histogram(name: str, help: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> Metric:
    return Metric(name, Kind.HISTOGRAM, help, labels, bounds)


# ---- calls ------------------------------------------------------------------

RPC_CALLS = _counter(
    "bear_rpc_calls_total", "Calls that have ended, by status.", "service", "method", "code", "reason"
)
RPC_IN_FLIGHT = _gauge("bear_rpc_in_flight", "Calls that have not ended.", "service", "method")
RPC_WRITE_STALL = _counter(
    "bear_rpc_write_stall_seconds_total",
    "Time in which messages waited for a client's window, each for 10 ms or more.",
    "service",
    "method",
)

# ---- generations ------------------------------------------------------------

TIME_TO_FIRST_TOKEN = _histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "From a request to its first piece of text, loads and the queue included.",
    GEN_AI,
    _FIRST_S,
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Mean time of an answer's tokens after its first, of requests that ended well.",
    GEN_AI,
    _TOKEN_S,
)
REQUEST_DURATION = _histogram(
    "gen_ai_server_request_duration_seconds",
    "From a request to its end, however it ended; error_type is its code if that is not OK.",
    (*GEN_AI, "error_type"),
    _WHOLE_S,
)
TOKEN_USAGE = _histogram(
    "gen_ai_client_token_usage",
    "Tokens of a request: of its prompt (input) and of all its answers (output).",
    (*GEN_AI, "gen_ai_token_type"),
    _TOKENS,
)
INTER_TOKEN_GAP = _histogram(
    "bear_inter_token_gap_seconds", "Time between a request's pieces of text.", MODEL, _GAP_S
)
QUEUE = _histogram("bear_queue_seconds", "Time a request waited for a slot.", MODEL, _QUEUE_S)
PREFILL_RATE = _histogram(
    "bear_prefill_tokens_per_second", "Rate at which a request's prompt was read.", MODEL, _PREFILL_RATE
)
DECODE_RATE = _histogram(
    "bear_decode_tokens_per_second", "Rate at which an answer's tokens came.", MODEL, _RATE
)
TOKENS = _counter(
    "bear_tokens_total", "Tokens of requests: prompt, cached of these, completion.", "model", "kind"
)
ANSWERS = _counter("bear_answers_total", "Answers that ended by a finish reason.", "model", "finish_reason")

# ---- models and their engines -----------------------------------------------

MODELS = _gauge("bear_models", "Models by state.", "state")
LOADS = _counter("bear_model_loads_total", "Loads that have ended, restarts included.", "model", "outcome")
RESTARTS = _counter("bear_worker_restarts_total", "Deaths of a worker that was started again.", "model")
RUNNING = _gauge("bear_sequences_running", "Sequences that hold a slot.", "model")
WAITING = _gauge("bear_sequences_waiting", "Sequences that wait for a slot.", "model")
KV_TOKENS = _gauge("bear_kv_cache_tokens", "Cells of the KV cache.", "model")
KV_USED = _gauge("bear_kv_cache_used_tokens", "Cells that hold a token, those of prefixes included.", "model")
KV_PREFIX = _gauge("bear_kv_cache_prefix_tokens", "Cells that hold only kept prefixes.", "model")
SNAPSHOT_TOKENS = _gauge("bear_snapshot_tokens", "Tokens of prefixes kept outside of the KV cache.", "model")
SNAPSHOT_BYTES = _gauge("bear_snapshot_bytes", "What these take.", "model")
MODEL_MEMORY = _gauge(
    "bear_model_memory_bytes",
    "Memory of a loaded model: weights, kv_cache; compute and overhead as planned.",
    "model",
    "kind",
)
WORKER_MEMORY = _gauge("bear_worker_memory_bytes", "What a worker's process holds (its PSS).", "model")
ENGINE_STEPS = _counter("bear_engine_steps_total", "Steps since the worker's start.", "model")
ENGINE_TOKENS = _counter(
    "bear_engine_tokens_total", "Tokens computed, or found in the cache.", "model", "phase"
)
ENGINE_SEQUENCES = _counter(
    "bear_engine_sequences_total", "Sequences that have ended, by their end.", "model", "end"
)
ENGINE_PREEMPTIONS = _counter("bear_engine_preemptions_total", "Sequences that had to make way.", "model")
ENGINE_SECONDS = _counter("bear_engine_seconds_total", "Time of steps by what it went into.", "model", "part")
PULL_COMPLETED = _gauge("bear_pull_completed_bytes", "Of a download under way: what is here.", "model")
PULL_TOTAL = _gauge("bear_pull_size_bytes", "Of a download under way: all of it.", "model")
PULL_RATE = _gauge("bear_pull_bytes_per_second", "Of a download under way.", "model")

# ---- the server -------------------------------------------------------------

INFO = _gauge("bear_info", "1, with the version.", "version")
DRAINING = _gauge("bear_draining", "1 when the server takes no new work.")
DEVICE_FREE = _gauge("bear_device_free_bytes", "Free memory of a GPU.", "device")
DEVICE_TOTAL = _gauge("bear_device_memory_bytes", "Memory of a GPU.", "device")
LOG_DROPPED = _counter("bear_log_lines_dropped_total", "Log lines that found the queue full.")
PROCESS_CPU = _counter("process_cpu_seconds_total", "Time on the CPU of the server's own process.")
PROCESS_MEMORY = _gauge("process_resident_memory_bytes", "Resident memory of the server's own process.")
PROCESS_FILES = _gauge("process_open_fds", "Open files of the server's own process.")
PROCESS_START = _gauge("process_start_time_seconds", "When the server was started, in seconds since 1970.")

FAMILIES: dict[str, Metric] = {
    value.name: value for value in list(globals().values()) if isinstance(value, Metric)
}
