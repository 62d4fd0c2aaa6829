"""Options, parameters and models between protobuf and domain. Checks what the contract limits.

Functions `x_from_proto` and `x_to_proto` undo each other.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
from google.protobuf import timestamp_pb2

from ..errors import FieldViolation, InvalidField
from ..input_limits import DEFAULT_LIMITS, InputLimits
from ..models.entry import ModelEntry, ModelStatus
from ..params import GenerationDefaults, SamplerKind, SamplingParams
from ..types import CostTable, HubSource, KvCacheType, LoadOptions, ModelFile, PullProgress, check
from ..v1 import inference_service_pb2 as inference_pb
from ..v1 import model_service_pb2 as model_pb
from ..v1 import types_pb2 as pb
from .ledger import ledger_to_proto

E = TypeVar("E", bound=enum.Enum)
T = TypeVar("T")

# Fields of SamplingParams that are lists in the contract: empty is unset.
_REPEATED = ("logit_bias", "dry_sequence_breakers", "sampler_order")


class Collector:
    """Runs checks and keeps what they find, so that one error names every wrong field."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """A field that is wrong."""
        self.found.append(FieldViolation(field, description))

    def take(self, read: Callable[[], T], instead: T) -> T:
        """What `read` gives; `instead` if it raises InvalidField, whose fields are kept."""
        try:
            return read()
        except InvalidField as exc:
            self.found += exc.violations
            return instead

    def raise_found(self) -> None:
        """Raises InvalidField if anything was found."""
        check(self.found)


def enum_to_proto(value: enum.Enum | None, wrapper: Any, prefix: str) -> Any:
    """The contract's value of the same name; its zero for None."""
    return 0 if value is None else wrapper.Value(f"{prefix}_{value.name}")


def enum_from_proto(number: int, wrapper: Any, prefix: str, kind: type[E], field: str) -> E:
    """Our value of the same name. Raises InvalidField for numbers that have none."""
    try:
        return kind[wrapper.Name(number).removeprefix(f"{prefix}_")]
    except (KeyError, ValueError):
        raise InvalidField(field, f"must be a named value, is {number}") from None


def load_options_from_proto(message: pb.LoadOptions, prefix: str = "options") -> LoadOptions:
    """Raises InvalidField naming every field that is out of its limits."""
    values: dict[str, Any] = {
        name: getattr(message, name)
        for name in LoadOptions.__struct_fields__
        if name not in ("kv_cache_type", "keep_alive_s") and message.HasField(name)  # type: ignore[arg-type]
    }
    if message.HasField("keep_alive"):
        values["keep_alive_s"] = message.keep_alive.ToNanoseconds() / 1e9
    wrong = Collector()
    number, field = message.kv_cache_type, f"{prefix}.kv_cache_type"
    if message.HasField("kv_cache_type") and number:
        values["kv_cache_type"] = wrong.take(
            lambda: enum_from_proto(number, pb.KvCacheType, "KV_CACHE_TYPE", KvCacheType, field), None
        )
    options = LoadOptions(**values)
    wrong.found += options.violations(prefix)
    wrong.raise_found()
    return options


def load_options_to_proto(options: LoadOptions) -> pb.LoadOptions:
    values = {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
    kind = values.pop("kv_cache_type", None)
    keep_alive_s = values.pop("keep_alive_s", None)
    message = pb.LoadOptions(**values)
    if keep_alive_s is not None:
        message.keep_alive.FromNanoseconds(round(keep_alive_s * 1e9))
    if kind is not None:
        message.kv_cache_type = enum_to_proto(kind, pb.KvCacheType, "KV_CACHE_TYPE")
    return message


def overrides_from_proto(
    message: inference_pb.SamplingParams, limits: InputLimits = DEFAULT_LIMITS
) -> dict[str, Any]:
    """The sampling values that are set, by name. Raises InvalidField for bad ones."""
    wrong = Collector()
    names = [name for name in SamplingParams.__struct_fields__ if name not in _REPEATED]
    values: dict[str, Any] = {name: getattr(message, name) for name in names if message.HasField(name)}  # type: ignore[arg-type]
    if message.logit_bias:
        values["logit_bias"] = tuple((bias.token_id, bias.bias) for bias in message.logit_bias)
    if message.dry_sequence_breakers:
        values["dry_sequence_breakers"] = tuple(message.dry_sequence_breakers)
    if message.sampler_order:
        values["sampler_order"] = _sampler_order(message.sampler_order, wrong)
    # Unset fields have good values, so all that is found wrong was set.
    wrong.found += SamplingParams(**values).violations(limits=limits)
    wrong.raise_found()
    return values


def _sampler_order(numbers: Iterable[int], wrong: Collector) -> tuple[SamplerKind, ...]:
    kinds = []
    for place, number in enumerate(numbers):
        read = functools.partial(
            enum_from_proto,
            number,
            inference_pb.SamplerKind,
            "SAMPLER_KIND",
            SamplerKind,
            f"sampling.sampler_order[{place}]",
        )
        kind = wrong.take(read, None)
        if kind is not None:
            kinds.append(kind)
    return tuple(kinds)


def sampling_from_proto(message: inference_pb.SamplingParams) -> SamplingParams:
    return SamplingParams(**overrides_from_proto(message))


def sampling_to_proto(sampling: SamplingParams) -> inference_pb.SamplingParams:
    values = {name: value for name, value in msgspec.structs.asdict(sampling).items() if value is not None}
    biases, kinds = values.pop("logit_bias"), values.pop("sampler_order")
    return inference_pb.SamplingParams(
        **values,
        logit_bias=[inference_pb.LogitBias(token_id=token, bias=bias) for token, bias in biases],
        sampler_order=[enum_to_proto(kind, inference_pb.SamplerKind, "SAMPLER_KIND") for kind in kinds],
    )


def defaults_from_proto(message: model_pb.SamplingOverrides) -> GenerationDefaults:
    """Raises InvalidField naming every field that is out of its limits."""
    names = GenerationDefaults.__struct_fields__
    values: dict[str, Any] = {name: getattr(message, name) for name in names if message.HasField(name)}  # type: ignore[arg-type]
    defaults = GenerationDefaults(**values)
    check(defaults.violations())
    return defaults


def defaults_to_proto(defaults: GenerationDefaults) -> model_pb.SamplingOverrides:
    values = {name: value for name, value in msgspec.structs.asdict(defaults).items() if value is not None}
    return model_pb.SamplingOverrides(**values)


def status_to_proto(status: ModelStatus) -> pb.ModelStatus:
    """`weights`, `process` and the like are left unset while nothing is loaded."""
    since = timestamp_pb2.Timestamp()
    since.FromDatetime(status.since)
    stats, options = status.stats, status.options
    message = pb.ModelStatus(
        name=status.name,
        state=enum_to_proto(status.state, pb.ModelState, "MODEL_STATE"),
        reason=enum_to_proto(status.reason, pb.ModelStateReason, "MODEL_STATE_REASON"),
        message=status.message,
        running_count=stats.running,
        waiting_count=max(0, status.in_flight - stats.running),
        kv_cache_used_token_count=stats.kv_used_tokens,
        kv_cache_idle_token_count=stats.kv_idle_tokens,
        snapshot_token_count=stats.snapshot_tokens,
        snapshot_bytes=stats.snapshot_bytes,
        since_time=since,
        worker_process_id=status.pid,
    )
    if status.stage is not None:
        stage = enum_to_proto(status.stage, pb.LoadStage, "LOAD_STAGE")
        message.load_progress.CopyFrom(pb.LoadProgress(stage=stage, fraction=status.fraction))
    if status.pull is not None:
        message.pull.CopyFrom(pull_progress_to_proto(status.pull))
    if status.expires is not None:
        message.expire_time.FromDatetime(status.expires)
    if options is not None:
        message.effective_options.CopyFrom(load_options_to_proto(options))
    if status.process_bytes and options is None:
        message.memory.CopyFrom(
            pb.MemoryLedger(process_bytes=status.process_bytes, overhead_bytes=status.process_bytes)
        )
    if status.is_loaded and options is not None:
        message.kv_cache_token_count = options.kv_cache_tokens or 0
        message.memory.CopyFrom(ledger_to_proto(status))
        message.counters.CopyFrom(
            pb.EngineCounters(
                step_count=stats.steps,
                prefill_token_count=stats.prefill_tokens,
                decode_token_count=stats.decode_tokens,
                submitted_sequence_count=stats.submitted,
                finished_sequence_count=stats.finished,
                cancelled_sequence_count=stats.cancelled,
                failed_sequence_count=stats.failed,
                cached_token_count=stats.cached_tokens,
                preemption_count=stats.preemptions,
                forward_seconds=stats.forward_s,
                sampling_seconds=stats.sampling_s,
                overhead_seconds=stats.overhead_s,
            )
        )
    return message


def cost_table_to_proto(table: CostTable) -> pb.CostTable:
    costs = [pb.StepCost(token_count=cost.tokens, seconds=cost.seconds) for cost in table.costs]
    return pb.CostTable(repack=table.repack, threads=table.threads, costs=costs, options=table.options)


def model_to_proto(entry: ModelEntry, status: ModelStatus | None = None) -> pb.Model:
    """With the status as it is now, if none is given."""
    header, sampling = entry.header, entry.sampling(seed=0)
    capabilities = []
    if header is not None or entry.chat_template is not None:
        capabilities.append(pb.MODEL_CAPABILITY_GENERATE)
    if entry.has_chat_template:
        capabilities.append(pb.MODEL_CAPABILITY_CHAT)
    described = header.metadata.get("general.description") if header is not None else None
    message = pb.Model(
        name=entry.name,
        aliases=entry.aliases,
        description=entry.description or (described if isinstance(described, str) else ""),
        source=_source_to_proto(entry),
        size_bytes=entry.size_bytes,
        sha256=entry.sha256,
        defaults=pb.GenerationDefaults(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            repetition_window=sampling.repetition_window,
            max_tokens=entry.max_tokens,
        ),
        load_options=load_options_to_proto(entry.load_options),
        status=status_to_proto(status or entry.status()),
        cost_tables=[cost_table_to_proto(table) for table in entry.cost_tables],
        capabilities=capabilities,
        license=entry.license,
        files=_files_to_proto(entry),
    )
    if header is not None:
        message.architecture = header.architecture or ""
        message.quantization = header.quantization or ""
        message.parameter_count = header.parameter_count
        message.context_length = header.context_length or 0
        message.license = header.license or entry.license
    return message


def hub_source_to_proto(source: HubSource) -> pb.HubSource:
    return pb.HubSource(repo_id=source.repo_id, file=source.file, revision=source.revision)


def _source_to_proto(entry: ModelEntry) -> pb.ModelSource:
    if entry.is_embedded:
        return pb.ModelSource(embedded=pb.EmbeddedSource())
    if entry.source is not None:
        return pb.ModelSource(hub=hub_source_to_proto(entry.source))
    return pb.ModelSource(file=pb.FileSource(path=str(entry.path)))


def _files_to_proto(entry: ModelEntry) -> list[pb.ModelFile]:
    files = entry.files
    if not files and entry.path is not None:
        files = (ModelFile(entry.path.name, entry.sha256, entry.size_bytes),)
    return [pb.ModelFile(file=file.file, sha256=file.sha256, size_bytes=file.size_bytes) for file in files]


def pull_progress_to_proto(progress: PullProgress) -> pb.PullProgress:
    return pb.PullProgress(
        stage=enum_to_proto(progress.stage, pb.PullStage, "PULL_STAGE"),
        completed_bytes=progress.completed_bytes,
        total_bytes=progress.total_bytes,
        bytes_per_second=progress.bytes_per_s,
        remaining_seconds=progress.remaining_s,
    )
