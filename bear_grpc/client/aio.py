"""The asyncio client: the methods of `sync.Client`, awaited. The requests are built in `requests.py`."""
# ruff: noqa: ASYNC109 -- a deadline of gRPC: the server sees it too

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from bear_grpc.client import requests
from bear_grpc.client.channel import (
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    ChannelOptions,
    call_metadata,
    channel_options,
    deadline,
)
from bear_grpc.client.errors import ServerUnreachable, translate
from bear_grpc.client.options import DefaultsOptions, GenerateOptions, LoadOptions, Message, Seconds
from bear_grpc.client.streams import AsyncStream
from bear_grpc.client.tls import Tls, address_of, tls_of
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import server_service_pb2 as server
from bear_grpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from bear_grpc.v1.model_service_pb2_grpc import ModelServiceStub
from bear_grpc.v1.server_service_pb2_grpc import ServerServiceStub
from bear_grpc.v1.types_pb2 import Model

Q = TypeVar("Q")
R = TypeVar("R")


def _connect(target: str, tls: Tls | bool, options: ChannelOptions | None) -> grpc.aio.Channel:
    secured, address = tls_of(target, tls), address_of(target)
    if secured is None:
        return grpc.aio.insecure_channel(address, channel_options(address, options))
    arguments = channel_options(address, options, secured.server_name)
    return grpc.aio.secure_channel(address, secured.credentials(), arguments)


class AsyncClient:
    """`Client` for asyncio: the same methods and arguments, to be awaited; streams at once, with `async for`.

    One loop's own: make it inside the running loop that uses it.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        tls: Tls | bool = False,
        options: ChannelOptions | None = None,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        """A `channel` of the caller's own is used as it is, without `tls`, and not closed here.

        `api_key` goes with every call. Raises ValueError for what cannot be one.
        """
        self.target = target
        self._metadata = call_metadata(api_key)
        self._timeout = timeout
        self._own = None if channel else _connect(target, tls, options)
        used = channel or self._own
        assert used is not None
        self._inference = InferenceServiceStub(used)
        self._models = ModelServiceStub(used)
        self._server = ServerServiceStub(used)
        health: Any = HealthStub(used)
        self._check: grpc.aio.UnaryUnaryMultiCallable[HealthCheckRequest, HealthCheckResponse] = health.Check
        self._watch: grpc.aio.UnaryStreamMultiCallable[HealthCheckRequest, HealthCheckResponse] = health.Watch

    async def close(self) -> None:
        """Ends all running calls and the connection."""
        if self._own is not None:
            await self._own.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _unary(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        try:
            return await method(request, timeout=deadline(timeout, None), metadata=self._metadata)
        except grpc.RpcError as failed:
            raise translate(failed, self.target) from failed

    async def _quick(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        return await self._unary(method, request, deadline(timeout, self._timeout))

    def _stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> AsyncStream[R]:
        return AsyncStream(
            method(request, timeout=deadline(timeout, None), metadata=self._metadata), self.target
        )

    # Text

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream[inference.GenerateResponse]:
        return self._stream(self._inference.Generate, requests.generate(model, prompt, options), timeout)

    def stream_text(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream[str]:
        request = requests.one_text(model, prompt, options)
        call = self._inference.Generate(request, timeout=deadline(timeout, None), metadata=self._metadata)
        return AsyncStream(call, self.target, requests.text_of)

    async def generate_once(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> inference.GenerateOnceResponse:
        request = inference.GenerateOnceRequest(request=requests.generate(model, prompt, options))
        return await self._unary(self._inference.GenerateOnce, request, timeout)

    async def tokenize(
        self,
        model: str,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        add_special: bool | None = None,
        parse_special: bool = False,
        include_pieces: bool = False,
        timeout: float | None = None,
    ) -> inference.TokenizeResponse:
        request = requests.tokenize(
            model,
            text,
            messages,
            add_special=add_special,
            parse_special=parse_special,
            include_pieces=include_pieces,
        )
        return await self._unary(self._inference.Tokenize, request, timeout)

    async def detokenize(
        self,
        model: str,
        token_ids: Iterable[int],
        *,
        include_special: bool = False,
        timeout: float | None = None,
    ) -> inference.DetokenizeResponse:
        request = requests.detokenize(model, token_ids, include_special)
        return await self._unary(self._inference.Detokenize, request, timeout)

    async def count_tokens(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
    ) -> inference.CountTokensResponse:
        return await self._unary(
            self._inference.CountTokens, requests.count_tokens(model, prompt, messages), timeout
        )

    # Models

    async def list_models(
        self, *, states: Iterable[str | int] = (), page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[Model]:
        request = requests.list_models(states, page_size)
        while True:
            page = await self._quick(self._models.ListModels, request, timeout)
            for model in page.models:
                yield model
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_model(
        self,
        name: str,
        *,
        include_metadata: bool = False,
        include_tensors: bool = False,
        timeout: float | None = None,
    ) -> models.GetModelResponse:
        request = models.GetModelRequest(
            name=name, include_metadata=include_metadata, include_tensors=include_tensors
        )
        return await self._quick(self._models.GetModel, request, timeout)

    async def get_model_status(
        self, name: str, *, timeout: float | None = None
    ) -> models.GetModelStatusResponse:
        return await self._quick(
            self._models.GetModelStatus, models.GetModelStatusRequest(name=name), timeout
        )

    def watch_models(
        self, *names: str, timeout: float | None = None
    ) -> AsyncStream[models.WatchModelsResponse]:
        return self._stream(self._models.WatchModels, models.WatchModelsRequest(names=names), timeout)

    def pull_model(
        self,
        name: str | None = None,
        *,
        repo_id: str | None = None,
        file: str | None = None,
        revision: str | None = None,
        timeout: float | None = None,
    ) -> AsyncStream[models.PullModelResponse]:
        request = requests.pull_model(name, repo_id, file, revision)
        return self._stream(self._models.PullModel, request, timeout)

    async def cancel_pull(self, name: str, *, timeout: float | None = None) -> models.CancelPullResponse:
        return await self._quick(self._models.CancelPull, models.CancelPullRequest(name=name), timeout)

    async def load_model(
        self, name: str, *, timeout: float | None = None, **options: Unpack[LoadOptions]
    ) -> models.LoadModelResponse:
        return await self._unary(self._models.LoadModel, requests.load_model(name, options), timeout)

    async def unload_model(
        self, name: str, *, drain_timeout: Seconds | None = None, timeout: float | None = None
    ) -> models.UnloadModelResponse:
        return await self._unary(
            self._models.UnloadModel, requests.unload_model(name, drain_timeout), timeout
        )

    async def register_model(
        self,
        name: str,
        path: str,
        *,
        aliases: Iterable[str] = (),
        defaults: DefaultsOptions | None = None,
        load_options: LoadOptions | None = None,
        timeout: float | None = None,
    ) -> models.RegisterModelResponse:
        request = requests.register_model(name, path, aliases, defaults, load_options)
        return await self._quick(self._models.RegisterModel, request, timeout)

    async def delete_model(self, name: str, *, timeout: float | None = None) -> models.DeleteModelResponse:
        return await self._quick(self._models.DeleteModel, models.DeleteModelRequest(name=name), timeout)

    async def prune_models(
        self, *, dry_run: bool = False, timeout: float | None = None
    ) -> models.PruneModelsResponse:
        return await self._unary(
            self._models.PruneModels, models.PruneModelsRequest(dry_run=dry_run), timeout
        )

    async def estimate_memory(
        self,
        name: str | None = None,
        *,
        repo_id: str | None = None,
        file: str | None = None,
        revision: str | None = None,
        timeout: float | None = None,
        **options: Unpack[LoadOptions],
    ) -> models.EstimateMemoryResponse:
        request = requests.estimate_memory(name, repo_id, file, revision, options)
        return await self._unary(self._models.EstimateMemory, request, timeout)

    # The server

    async def server_info(self, *, timeout: float | None = None) -> server.GetServerInfoResponse:
        return await self._quick(self._server.GetServerInfo, server.GetServerInfoRequest(), timeout)

    async def get_load(self, *, timeout: float | None = None) -> server.GetLoadResponse:
        return await self._quick(self._server.GetLoad, server.GetLoadRequest(), timeout)

    def watch_load(
        self, interval: Seconds | None = None, *, timeout: float | None = None
    ) -> AsyncStream[server.WatchLoadResponse]:
        return self._stream(self._server.WatchLoad, requests.watch_load(interval), timeout)

    async def drain(self, *, timeout: float | None = None) -> server.DrainResponse:
        return await self._quick(self._server.Drain, server.DrainRequest(), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> HealthCheckResponse:
        return await self._quick(self._check, HealthCheckRequest(service=service), timeout)

    async def wait_until_serving(self, service: str = "", *, timeout: float | None = None) -> None:
        limit = deadline(timeout, self._timeout)
        call = self._watch(
            HealthCheckRequest(service=service), timeout=limit, wait_for_ready=True, metadata=self._metadata
        )
        async with AsyncStream[HealthCheckResponse](call, self.target) as answers:
            async for answer in answers:
                if answer.status == HealthCheckResponse.SERVING:
                    return
        raise ServerUnreachable(f"the server at {self.target} stopped before it served")
