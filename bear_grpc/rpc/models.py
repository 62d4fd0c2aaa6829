"""ModelService: what models there are, and their life."""

from __future__ import annotations

import base64
import json
import re
from contextlib import aclosing
from typing import Any

from ..errors import Draining, InvalidField
from ..models.entry import ModelEntry
from ..models.estimate import Estimator
from ..models.manager import ModelManager
from ..models.pulls import PullManager
from ..models.registry import Registration
from ..models.shelf import Shelf
from ..params import GenerationDefaults
from ..types import LoadOptions
from ..v1 import model_service_pb2 as pb
from ..v1 import model_service_pb2_grpc as pb_grpc
from .call import current_call
from .convert import (
    Collector,
    defaults_from_proto,
    load_options_from_proto,
    model_to_proto,
    status_to_proto,
)
from .inspection import metadata_to_proto, mix_to_proto, plan_to_proto, tensors_to_proto
from .ledger import measured
from .pulls import source_from_proto, steps_of, target_of
from .status import answer
from .writing import Writer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_PAGE_TOKEN = 1024  # JSON is read from it: deep nesting costs stack
DEFAULT_DRAIN_S = 30.0


class ModelServicer(pb_grpc.ModelServiceServicer):
    """Streaming methods write to their context: a generator would be closed late or never."""

    def __init__(
        self,
        shelf: Shelf,
        manager: ModelManager,
        pulls: PullManager,
        estimator: Estimator,
        stall_timeout_s: float,
    ) -> None:
        self._shelf = shelf
        self._manager = manager
        self._pulls = pulls
        self._estimator = estimator
        self._stall_timeout_s = stall_timeout_s

    @answer
    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        if request.page_size < 0:
            raise InvalidField("page_size", f"must be 0 or more, is {request.page_size}")
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        wanted: list[int] = sorted(set(request.states))
        after = _read_page_token(request.page_token, wanted)
        may_use = current_call(context).caller.may_use
        entries = [entry for entry in self._shelf.list() if entry.name > after and may_use(entry.name)]
        found = zip(entries, await measured(entries), strict=True)
        models = [model_to_proto(entry, status) for entry, status in found]
        models = [model for model in models if not wanted or model.status.state in wanted]
        page, more = models[:size], len(models) > size
        token = _page_token(page[-1].name, wanted) if more else ""
        return pb.ListModelsResponse(models=page, next_page_token=token)

    @answer
    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        entry = self._shelf.find(self._required(request.name))
        if entry is None or (entry.header is None and (request.include_metadata or request.include_tensors)):
            entry = await self._known_or_remote(request.name)
        (status,) = await measured([entry])
        answer = pb.GetModelResponse(model=model_to_proto(entry, status))
        if entry.header is not None:
            answer.quantization_mix.extend(mix_to_proto(entry.header))
            if request.include_metadata:
                answer.metadata.extend(metadata_to_proto(entry.header))
            if request.include_tensors:
                answer.tensors.extend(tensors_to_proto(entry.header))
        return answer

    @answer
    async def GetModelStatus(
        self, request: pb.GetModelStatusRequest, context: Any
    ) -> pb.GetModelStatusResponse:
        entry = self._entry(request.name)
        (status,) = await measured([entry])
        return pb.GetModelStatusResponse(status=status_to_proto(status))

    @answer
    async def WatchModels(self, request: pb.WatchModelsRequest, context: Any) -> None:
        names = {self._shelf.get(name).name for name in request.names}
        may_use = current_call(context).caller.may_use
        now = [entry.status() for entry in self._shelf.list()]
        with self._shelf.feed.watch(now) as watcher, Writer(context, self._stall_timeout_s) as writer:
            async for status in watcher:
                if (not names or status.name in names) and may_use(status.name):
                    await writer.write(pb.WatchModelsResponse(status=status_to_proto(status)))
        raise Draining()  # only the server's stop ends the feed

    @answer
    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        options = load_options_from_proto(request.options)
        entry, seconds = await self._manager.load(self._required(request.name), options)
        (status,) = await measured([entry])
        return pb.LoadModelResponse(status=status_to_proto(status), load_seconds=seconds)

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
        name = self._required(request.name)
        entry = self._shelf.find(name)
        if entry is None or entry.name != name or entry.source is None:
            await self._shelf.delete(name)
            return pb.DeleteModelResponse(released_bytes=0)
        return pb.DeleteModelResponse(released_bytes=await self._pulls.remove(entry))

    @answer
    async def PullModel(self, request: pb.PullModelRequest, context: Any) -> None:
        if self._manager.is_draining:
            raise Draining()
        download = self._pulls.begin(target_of(request))
        with Writer(context, self._stall_timeout_s) as writer:
            async with aclosing(steps_of(download)) as steps:
                async for step in steps:
                    await writer.write(step)
            model = model_to_proto(self._shelf.get(download.name))
            await writer.write(pb.PullModelResponse(completed=pb.PullCompleted(model=model)))

    @answer
    async def CancelPull(self, request: pb.CancelPullRequest, context: Any) -> pb.CancelPullResponse:
        return pb.CancelPullResponse(kept_bytes=await self._pulls.cancel(self._required(request.name)))

    @answer
    async def PruneModels(self, request: pb.PruneModelsRequest, context: Any) -> pb.PruneModelsResponse:
        removed = await self._pulls.prune(dry_run=request.dry_run)
        files = [pb.PrunedFile(path=path.as_posix(), size_bytes=size) for path, size in removed]
        return pb.PruneModelsResponse(files=files)

    @answer
    async def EstimateMemory(
        self, request: pb.EstimateMemoryRequest, context: Any
    ) -> pb.EstimateMemoryResponse:
        options = load_options_from_proto(request.options)
        match request.WhichOneof("target"):
            case "name":
                entry = await self._known_or_remote(request.name)
            case "source":
                entry = await self._pulls.look_at(source_from_proto(request.source))
            case _:
                raise InvalidField("target", "name or source is required")
        plan = await self._estimator.estimate(entry, options)
        return plan_to_proto(plan)

    async def _known_or_remote(self, name: str) -> ModelEntry:
        """A model of this server with its header, or a look at the hub. Raises ModelNotFound."""
        entry = self._shelf.find(self._required(name))
        if entry is not None and (entry.header is not None or entry.source is None):
            return entry
        return await self._pulls.look_at(self._pulls.reference_of(name))

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
