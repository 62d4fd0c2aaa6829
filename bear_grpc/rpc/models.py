"""ModelService: what models there are, and their life."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import Any

from ..errors import FeatureUnsupported, InvalidField
from ..models.entry import ModelEntry
from ..models.manager import ModelManager
from ..models.registry import Registration
from ..models.shelf import Shelf
from ..params import GenerationDefaults
from ..types import LoadOptions
from ..v1 import model_service_pb2 as pb
from ..v1 import model_service_pb2_grpc as pb_grpc
from .convert import (
    Collector,
    defaults_from_proto,
    load_options_from_proto,
    metadata_to_proto,
    model_to_proto,
    status_to_proto,
)
from .status import answer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_PAGE_TOKEN = 1024  # JSON is read from it: deep nesting costs stack
DEFAULT_DRAIN_S = 30.0


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Streaming methods write to their context: a generator would be closed late or never."""

    def __init__(self, shelf: Shelf, manager: ModelManager) -> None:
        self._shelf = shelf
        self._manager = manager

    @answer
    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        if request.page_size < 0:
            raise InvalidField("page_size", f"must be 0 or more, is {request.page_size}")
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        wanted: list[int] = sorted(set(request.states))
        after = _read_page_token(request.page_token, wanted)
        models = [model_to_proto(entry) for entry in self._shelf.list() if entry.name > after]
        models = [model for model in models if not wanted or model.status.state in wanted]
        page, more = models[:size], len(models) > size
        token = _page_token(page[-1].name, wanted) if more else ""
        return pb.ListModelsResponse(models=page, next_page_token=token)

    @answer
    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        entry = self._entry(request.name)
        with_metadata = request.include_metadata and entry.header is not None
        metadata = metadata_to_proto(entry.header) if with_metadata and entry.header else []
        return pb.GetModelResponse(model=model_to_proto(entry), metadata=metadata)

    @answer
    async def GetModelStatus(
        self, request: pb.GetModelStatusRequest, context: Any
    ) -> pb.GetModelStatusResponse:
        entry = self._entry(request.name)
        status = await asyncio.to_thread(entry.status, with_memory=True)
        return pb.GetModelStatusResponse(status=status_to_proto(status))

    @answer
    async def WatchModels(self, request: pb.WatchModelsRequest, context: Any) -> None:
        names = {self._shelf.get(name).name for name in request.names}
        with self._shelf.feed.watch() as watcher:
            for entry in self._shelf.list():
                if not names or entry.name in names:
                    await context.write(pb.WatchModelsResponse(status=status_to_proto(entry.status())))
            async for status in watcher:
                if not names or status.name in names:
                    await context.write(pb.WatchModelsResponse(status=status_to_proto(status)))

    @answer
    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        options = load_options_from_proto(request.options)
        entry, seconds = await self._manager.load(self._entry(request.name).name, options)
        return pb.LoadModelResponse(status=status_to_proto(entry.status()), load_seconds=seconds)

    @answer
    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        entry = self._entry(request.name)
        timeout_s = DEFAULT_DRAIN_S
        if request.HasField("drain_timeout"):
            timeout_s = request.drain_timeout.ToNanoseconds() / 1e9
            if timeout_s < 0:
                raise InvalidField("drain_timeout", f"must be 0 or more, is {timeout_s} s")
        unloaded = await self._manager.unload(entry.name, timeout_s)
        return pb.UnloadModelResponse(
            status=status_to_proto(entry.status()),
            released_bytes=unloaded.released_bytes,
            cancelled_count=unloaded.cancelled,
        )

    @answer
    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Any) -> pb.RegisterModelResponse:
        wrong = Collector()
        for field, name in [("name", request.name), *(("aliases", alias) for alias in request.aliases)]:
            if not _NAME.fullmatch(name):
                wrong.add(field, f"must match {_NAME.pattern}, is {name!r}")
        if not request.path:
            wrong.add("path", "is required")
        options = request.load_options
        registration = Registration(
            request.name,
            request.path,
            list(request.aliases),
            wrong.take(lambda: defaults_from_proto(request.defaults), GenerationDefaults()),
            wrong.take(lambda: load_options_from_proto(options, "load_options"), LoadOptions()),
        )
        wrong.raise_found()
        entry = await self._shelf.register(registration)
        return pb.RegisterModelResponse(model=model_to_proto(entry))

    @answer
    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> pb.DeleteModelResponse:
        await self._shelf.delete(self._required(request.name))
        return pb.DeleteModelResponse(released_bytes=0)

    @answer
    async def PullModel(self, request: pb.PullModelRequest, context: Any) -> None:
        raise FeatureUnsupported("PullModel")

    @answer
    async def CancelPull(self, request: pb.CancelPullRequest, context: Any) -> pb.CancelPullResponse:
        raise FeatureUnsupported("CancelPull")

    @answer
    async def PruneModels(self, request: pb.PruneModelsRequest, context: Any) -> pb.PruneModelsResponse:
        raise FeatureUnsupported("PruneModels")

    @answer
    async def EstimateMemory(
        self, request: pb.EstimateMemoryRequest, context: Any
    ) -> pb.EstimateMemoryResponse:
        raise FeatureUnsupported("EstimateMemory")

    def _required(self, name: str) -> str:
        if not name:
            raise InvalidField("name", "is required")
        return name

    def _entry(self, name: str) -> ModelEntry:
        return self._shelf.get(self._required(name))


def _page_token(last: str, wanted: list[int]) -> str:
    """Opaque to clients: where the page ended, and the filter that it belongs to."""
    return base64.urlsafe_b64encode(json.dumps([last, wanted]).encode()).decode()


def _read_page_token(token: str, wanted: list[int]) -> str:
    if not token:
        return ""
    try:
        if len(token) > MAX_PAGE_TOKEN:
            raise ValueError
        last, filter_ = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (TypeError, ValueError):
        raise InvalidField("page_token", "is not one of this server's") from None
    if filter_ != wanted or not isinstance(last, str):
        raise InvalidField("page_token", "belongs to a request with another filter")
    return last
