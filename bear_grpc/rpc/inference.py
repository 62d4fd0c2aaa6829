"""InferenceService: generation, tokens and text."""

from __future__ import annotations

import asyncio
import secrets
import struct
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..config import ServerConfig
from ..errors import FieldViolation, InvalidField, RequestIdInUse
from ..executor.executor import ModelExecutor
from ..input_limits import DEFAULT_LIMITS, InputLimits
from ..models.manager import ModelManager
from ..models.shelf import Shelf
from ..params import MAX_SEED, ChatInput, GenerationInput, TokensInput
from ..v1 import inference_service_pb2 as pb
from ..v1 import inference_service_pb2_grpc as pb_grpc
from .call import Call, current_call, note
from .convert import Collector, status_to_proto
from .deadline import deadline_of
from .events import response_to_proto
from .requests import GenerateSpec, check_token_ids, input_from_proto, spec_from_proto
from .status import answer
from .whole import Whole
from .writing import Writer

# Takes the messages of a generation, in order.
Tell = Callable[[pb.GenerateResponse], Awaitable[None]]


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Streaming methods write to their context: a generator would be closed late or never."""

    def __init__(
        self,
        shelf: Shelf,
        manager: ModelManager,
        prefix_sharing: str,
        stall_timeout_s: float,
        limits: InputLimits = DEFAULT_LIMITS,
        max_request_s: float = 0.0,
    ) -> None:
        self._shelf = shelf
        self._manager = manager
        self._prefix_sharing = prefix_sharing
        self._stall_timeout_s = stall_timeout_s
        self._max_request_s = max_request_s
        self._limits = limits
        self._running: set[tuple[str, str]] = set()  # tenants and ids

    def reload(self, config: ServerConfig) -> None:
        """Takes over limits, for requests that come from now on."""
        self._limits, self._max_request_s = config.limits, config.max_request_s

    @answer
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        with Writer(context, self._stall_timeout_s) as writer:
            await self._generate(self._spec(request, context), context, writer.write)

    @answer
    async def GenerateOnce(self, request: pb.GenerateOnceRequest, context: Any) -> pb.GenerateOnceResponse:
        if not request.HasField("request"):
            raise InvalidField("request", "is required")
        try:
            return await self._once(request.request, context)
        except InvalidField as exc:
            within = [FieldViolation(f"request.{v.field}", v.description) for v in exc.violations]
            raise InvalidField.of(within) from exc

    async def _once(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateOnceResponse:
        """The messages of a generation, put together."""
        spec = self._spec(request, context)
        whole = Whole(spec.n)
        await self._generate(spec, context, whole.add)
        return whole.response()

    @answer
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        source = _input_of(request, self._limits)
        executor = await self._executor(request.model, context)
        result = await executor.text(source, include_pieces=request.include_pieces)
        ids = struct.unpack(f"<{len(result.ids) // 4}i", result.ids)
        return pb.TokenizeResponse(token_ids=ids, pieces=result.pieces, rendered_text=result.text)

    @answer
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        if not request.model:
            raise InvalidField("model", "is required")
        ids = list(request.token_ids)
        check_token_ids("token_ids", ids, self._limits)
        executor = await self._executor(request.model, context)
        result = await executor.text(token_ids=ids, include_special=request.include_special)
        return pb.DetokenizeResponse(text=result.raw.decode(errors="replace"), raw=result.raw)

    @answer
    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        source = _input_of(request, self._limits)
        executor = await self._executor(request.model, context)
        result = await executor.text(source)
        ready = self._shelf.get(request.model).ready
        length = ready.options.context_length if ready is not None else None
        return pb.CountTokensResponse(token_count=len(result.ids) // 4, context_length=length or 0)

    async def _executor(self, model: str, context: Any) -> ModelExecutor:
        executor = await self._manager.executor(model)
        call = current_call(context)
        call.model, call.ready_s = executor.name, time.monotonic()
        return executor

    def _spec(self, request: pb.GenerateRequest, context: Any) -> GenerateSpec:
        return spec_from_proto(request, self._limits, current_call(context).caller.priority)

    @contextmanager
    def _hold_id(self, asked: str, tenant: str) -> Iterator[str]:
        """The request's id, the tenant's own while it runs. Raises RequestIdInUse."""
        request_id = asked or uuid.uuid4().hex
        held = (tenant, request_id)
        if held in self._running:
            raise RequestIdInUse(request_id)
        self._running.add(held)
        try:
            yield request_id
        finally:
            self._running.discard(held)

    async def _generate(self, spec: GenerateSpec, context: Any, tell: Tell) -> None:
        """Tells all messages of a generation; its work ends with this, however it ends."""
        call = current_call(context)
        call.model = spec.model
        call.operation = "chat" if isinstance(spec.input, ChatInput) else "text_completion"
        if call.transcript is not None:
            call.transcript.ask(spec.input)
        deadline_s = deadline_of(context, call.began_s, self._max_request_s)
        with self._hold_id(spec.request_id, call.caller.tenant) as request_id:
            call.request_id = request_id
            if spec.output.queue_progress:
                await self._load(spec, request_id, tell)
            using = self._manager.using(spec.model, spec.keep_alive_s, load_if_needed=spec.load_if_needed)
            async with using as executor:
                await self._run(spec, call, executor, deadline_s, tell)

    async def _run(
        self, spec: GenerateSpec, call: Call, executor: ModelExecutor, deadline_s: float, tell: Tell
    ) -> None:
        """Tells the messages of a generation on a model that is loaded."""
        entry = self._shelf.get(executor.name)
        sampling, stop = spec.complete(entry, secrets.randbelow(MAX_SEED + 1))
        call.model, call.ready_s = executor.name, time.monotonic()
        request_id, tenant = call.request_id, call.caller.tenant
        generation = executor.generate(
            spec.input,
            sampling,
            stop,
            n=spec.n,
            output=spec.output,
            constraint=spec.constraint,
            overflow=spec.overflow,
            scope=tenant if self._prefix_sharing == "tenant" else "",
            tenant=tenant,
            tag=spec.tag,
            priority=spec.priority,
            received_s=call.began_s,
            deadline_s=deadline_s,
            fail_on_restart=spec.fail_on_restart,
        )
        try:
            async for index, event in generation:
                note(call, event)
                message = response_to_proto(request_id, index, event, entry, sampling)
                if message is not None:
                    await tell(message)
        finally:
            call.restarts_s = generation.restarts_s
            generation.close()

    async def _load(self, spec: GenerateSpec, request_id: str, tell: Tell) -> None:
        """Downloads and loads the model where that is needed, and tells how it goes."""
        # The generation's own use follows at once.
        executor = self._manager.executor(spec.model, load_if_needed=spec.load_if_needed, hold_s=1.0)
        loading = asyncio.ensure_future(executor)
        try:
            with self._shelf.feed.watch() as watcher:
                loading.add_done_callback(lambda _: watcher.close())
                async for status in watcher:
                    # A model that is only a name on the hub gets its entry meanwhile.
                    entry = self._shelf.find(spec.model)
                    if entry is not None and status.name == entry.name:
                        progress = status_to_proto(status)
                        await tell(pb.GenerateResponse(request_id=request_id, model_progress=progress))
        finally:
            if not loading.done():
                loading.cancel()
        await loading


def _input_of(request: pb.TokenizeRequest | pb.CountTokensRequest, limits: InputLimits) -> GenerationInput:
    """The input of a request for tokens. Raises InvalidField naming every wrong field."""
    wrong = Collector()
    if not request.model:
        wrong.add("model", "is required")
    source: GenerationInput = TokensInput([])
    source = wrong.take(lambda: input_from_proto(request, limits), source)
    wrong.raise_found()
    return source
