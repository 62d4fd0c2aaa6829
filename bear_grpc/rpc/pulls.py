"""Downloads as messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..errors import InvalidField
from ..models.download import Download
from ..store.listing import Resolved
from ..store.reference import Reference, check_source
from ..types import HubSource, PullStage
from ..v1 import model_service_pb2 as pb
from ..v1 import types_pb2 as types_pb
from .convert import pull_progress_to_proto


def target_of(request: pb.PullModelRequest) -> str:
    """The name of the model that is asked for. Raises InvalidField."""
    match request.WhichOneof("target"):
        case "name":
            if not request.name:
                raise InvalidField("name", "is required")
            return request.name
        case "source":
            return source_from_proto(request.source).name
    raise InvalidField("target", "name or source is required")


def source_from_proto(message: types_pb.HubSource) -> Reference:
    """Raises InvalidField naming every field that is wrong."""
    source = HubSource(message.repo_id, message.file, message.revision or "main")
    check_source(source)
    return Reference(source.repo_id, source.file, None, source.revision)


async def steps_of(download: Download) -> AsyncGenerator[pb.PullModelResponse, None]:
    """What happens to a download until it is done. Raises what it raises."""
    is_told = False
    async with aclosing(download.watch()) as steps:
        async for progress in steps:
            if download.resolved is not None and not is_told:
                is_told = True
                yield pb.PullModelResponse(started=_started(download.resolved))
            if progress.stage is PullStage.VERIFYING:
                verifying = pb.PullVerifying(
                    completed_bytes=progress.completed_bytes, total_bytes=progress.total_bytes
                )
                yield pb.PullModelResponse(verifying=verifying)
            else:
                yield pb.PullModelResponse(progress=pull_progress_to_proto(progress))
    if download.resolved is not None and not is_told:
        yield pb.PullModelResponse(started=_started(download.resolved))


def _started(resolved: Resolved) -> pb.PullStarted:
    first = resolved.files[0]
    return pb.PullStarted(
        name=resolved.name,
        source=types_pb.HubSource(repo_id=resolved.repo_id, file=first.file, revision=resolved.commit),
        sha256=first.sha256 if len(resolved.files) == 1 else "",
        total_bytes=sum(file.size_bytes for file in resolved.files),
    )
