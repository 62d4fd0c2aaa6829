"""What a server tells of its models, in words: states, sources, options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bear_grpc.cli import output
from bear_grpc.cli.progress import pull_stage_name, stage_name

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from bear_grpc.v1.types_pb2 import HubSource, Model, ModelSource, ModelStatus


def state(status: ModelStatus) -> str:
    """The state, and how far a load or a download is."""
    from bear_grpc.v1 import types_pb2 as types

    # The set may grow: a new state is shown as its number.
    known = types.ModelState.DESCRIPTOR.values_by_number.get(status.state)
    name = known.name.removeprefix("MODEL_STATE_") if known else str(status.state)
    if status.state == types.MODEL_STATE_LOADING and status.load_progress.stage:
        name += f" ({stage_name(status.load_progress.stage)} {status.load_progress.fraction:.0%})"
    elif status.HasField("pull"):
        pull = status.pull
        done = f" {pull.completed_bytes / pull.total_bytes:.0%}" if pull.total_bytes else ""
        name += f" ({pull_stage_name(pull.stage)}{done})"
    return name


def requests(status: ModelStatus) -> str:
    """How many requests run and wait."""
    return f"{status.running_count} running, {status.waiting_count} waiting"


def until(status: ModelStatus) -> str:
    """How long a loaded model stays if nobody uses it."""
    from datetime import UTC

    if status.HasField("expire_time"):
        return output.from_now(status.expire_time.ToDatetime(UTC))
    options = status.effective_options
    ends = options.HasField("keep_alive") and options.keep_alive.ToTimedelta().total_seconds() >= 0
    # The time runs from the last use on: while the model is used there is none yet.
    if not ends:
        return "forever"
    return "in use" if status.running_count or status.waiting_count else "its next use"


def capabilities(model: Model) -> str:
    """What a model can be used for."""
    from bear_grpc.v1 import types_pb2 as types

    known = types.ModelCapability.DESCRIPTOR.values_by_number
    names = [known[value].name for value in model.capabilities if value in known]
    return ", ".join(name.removeprefix("MODEL_CAPABILITY_").lower() for name in names)


def source(given: ModelSource) -> str:
    """Where the weights come from; of the hub as `bear pull` takes it."""
    kind = given.WhichOneof("kind")
    if kind == "hub":
        return reference(given.hub)
    return given.file.path if kind == "file" else kind or ""


def reference(hub: HubSource) -> str:
    """A file on the hub as the name that every call takes."""
    revision = f"@{hub.revision}" if hub.revision not in ("", "main") else ""
    return f"{hub.repo_id}/{hub.file}{revision}"


def set_fields(message: Message) -> str:
    """The fields that are set, as `name=value`; durations as their own text."""
    from google.protobuf.json_format import MessageToDict

    values = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
    )
