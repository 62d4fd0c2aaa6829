"""The blocking client. Safe to share between threads; the requests are built in `requests.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
from bear_grpc.client.streams import Stream
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


def _connect(target: str, tls: Tls | bool, options: ChannelOptions | None) -> grpc.Channel:
    secured, address = tls_of(target, tls), address_of(target)
    if secured is None:
        return grpc.insecure_channel(address, channel_options(address, options))
    arguments = channel_options(address, options, secured.server_name)
    return grpc.secure_channel(address, secured.credentials(), arguments)


class Client:
    """A connection to a server at `HOST:PORT`, `grpcs://HOST:PORT` (TLS) or `unix:PATH`.

    Methods return the response message of their RPC and raise `BearError`s; streams yield the messages.
    `timeout` (seconds) of a method is the deadline of the call. Without one, calls that answer at once have
    the client's, and calls that may load a model or last as long as they last have none; `math.inf` is none.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        tls: Tls | bool = False,
        options: ChannelOptions | None = None,
        channel: grpc.Channel | None = None,
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
        self._check: grpc.UnaryUnaryMultiCallable[HealthCheckRequest, HealthCheckResponse] = health.Check
        self._watch: grpc.UnaryStreamMultiCallable[HealthCheckRequest, HealthCheckResponse] = health.Watch

    def close(self) -> None:
        """Ends all running calls and the connection."""
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unary(self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None) -> R:
        try:
            return method(request, timeout=deadline(timeout, None), metadata=self._metadata)
        except grpc.RpcError as failed:
            raise translate(failed, self.target) from failed

    def _quick(self, method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None) -> R:
        return self._unary(method, request, deadline(timeout, self._timeout))

    def _stream(
        self, method: grpc.UnaryStreamMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> Stream[R]:
        return Stream(method(request, timeout=deadline(timeout, None), metadata=self._metadata), self.target)

    # Text

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream[inference.GenerateResponse]:
        """The events of one generation, from a prompt, `token_ids=` or chat `messages=`."""
        return self._stream(self._inference.Generate, requests.generate(model, prompt, options), timeout)

    def stream_text(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream[str]:
        """The text of one generation as it comes; for n > 1 use `generate`, which tells the index."""
        request = requests.one_text(model, prompt, options)
        call = self._inference.Generate(request, timeout=deadline(timeout, None), metadata=self._metadata)
        return Stream(call, self.target, requests.text_of)

    def generate_once(
        self,
        model: str,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> inference.GenerateOnceResponse:
        """The whole answer: `response.choices[0].text`, with n > 1 one choice each."""
        request = inference.GenerateOnceRequest(request=requests.generate(model, prompt, options))
        return self._unary(self._inference.GenerateOnce, request, timeout)

    def tokenize(
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
        """A text's token ids, or a conversation's with the model's template."""
        request = requests.tokenize(
            model,
            text,
            messages,
            add_special=add_special,
            parse_special=parse_special,
            include_pieces=include_pieces,
        )
        return self._unary(self._inference.Tokenize, request, timeout)

    def detokenize(
        self,
        model: str,
        token_ids: Iterable[int],
        *,
        include_special: bool = False,
        timeout: float | None = None,
    ) -> inference.DetokenizeResponse:
        """The text of token ids."""
        request = requests.detokenize(model, token_ids, include_special)
        return self._unary(self._inference.Detokenize, request, timeout)

    def count_tokens(
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
    ) -> inference.CountTokensResponse:
        """How many tokens a prompt or a conversation has."""
        return self._unary(
            self._inference.CountTokens, requests.count_tokens(model, prompt, messages), timeout
        )

    # Models

    def list_models(
        self, *, states: Iterable[str | int] = (), page_size: int = 0, timeout: float | None = None
    ) -> Iterator[Model]:
        """Every model, page after page; `states` such as "ready" filter. The timeout is a page's."""
        request = requests.list_models(states, page_size)
        while True:
            page = self._quick(self._models.ListModels, request, timeout)
            yield from page.models
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def get_model(
        self,
        name: str,
        *,
        include_metadata: bool = False,
        include_tensors: bool = False,
        timeout: float | None = None,
    ) -> models.GetModelResponse:
        """One model, or a file on the hub; with its GGUF metadata and tensors if asked for."""
        request = models.GetModelRequest(
            name=name, include_metadata=include_metadata, include_tensors=include_tensors
        )
        return self._quick(self._models.GetModel, request, timeout)

    def get_model_status(self, name: str, *, timeout: float | None = None) -> models.GetModelStatusResponse:
        """Where a model stands."""
        return self._quick(self._models.GetModelStatus, models.GetModelStatusRequest(name=name), timeout)

    def watch_models(self, *names: str, timeout: float | None = None) -> Stream[models.WatchModelsResponse]:
        """The status of these models (or all), now and at every change."""
        return self._stream(self._models.WatchModels, models.WatchModelsRequest(names=names), timeout)

    def pull_model(
        self,
        name: str | None = None,
        *,
        repo_id: str | None = None,
        file: str | None = None,
        revision: str | None = None,
        timeout: float | None = None,
    ) -> Stream[models.PullModelResponse]:
        """Downloads a model: a name of the catalog, or a file on the hub.

        Leaving the stream does not stop the download; `cancel_pull` does.
        """
        request = requests.pull_model(name, repo_id, file, revision)
        return self._stream(self._models.PullModel, request, timeout)

    def cancel_pull(self, name: str, *, timeout: float | None = None) -> models.CancelPullResponse:
        """Stops a download; what has come is kept for the next one."""
        return self._quick(self._models.CancelPull, models.CancelPullRequest(name=name), timeout)

    def load_model(
        self, name: str, *, timeout: float | None = None, **options: Unpack[LoadOptions]
    ) -> models.LoadModelResponse:
        """Loads a model and returns when it is READY. Leaving does not stop the load."""
        return self._unary(self._models.LoadModel, requests.load_model(name, options), timeout)

    def unload_model(
        self, name: str, *, drain_timeout: Seconds | None = None, timeout: float | None = None
    ) -> models.UnloadModelResponse:
        """Unloads a model; running requests may go on for `drain_timeout` seconds."""
        return self._unary(self._models.UnloadModel, requests.unload_model(name, drain_timeout), timeout)

    def register_model(
        self,
        name: str,
        path: str,
        *,
        aliases: Iterable[str] = (),
        defaults: DefaultsOptions | None = None,
        load_options: LoadOptions | None = None,
        timeout: float | None = None,
    ) -> models.RegisterModelResponse:
        """Makes a GGUF file on the server known under a name."""
        request = requests.register_model(name, path, aliases, defaults, load_options)
        return self._quick(self._models.RegisterModel, request, timeout)

    def delete_model(self, name: str, *, timeout: float | None = None) -> models.DeleteModelResponse:
        """Forgets a registered model, or removes a pulled one."""
        return self._quick(self._models.DeleteModel, models.DeleteModelRequest(name=name), timeout)

    def prune_models(
        self, *, dry_run: bool = False, timeout: float | None = None
    ) -> models.PruneModelsResponse:
        """Removes partial downloads and files that no model uses; `dry_run` only tells which."""
        return self._unary(self._models.PruneModels, models.PruneModelsRequest(dry_run=dry_run), timeout)

    def estimate_memory(
        self,
        name: str | None = None,
        *,
        repo_id: str | None = None,
        file: str | None = None,
        revision: str | None = None,
        timeout: float | None = None,
        **options: Unpack[LoadOptions],
    ) -> models.EstimateMemoryResponse:
        """What a load with these options would take, without loading; of a file on the hub too."""
        request = requests.estimate_memory(name, repo_id, file, revision, options)
        return self._unary(self._models.EstimateMemory, request, timeout)

    # The server

    def server_info(self, *, timeout: float | None = None) -> server.GetServerInfoResponse:
        """Version, devices and limits."""
        return self._quick(self._server.GetServerInfo, server.GetServerInfoRequest(), timeout)

    def get_load(self, *, timeout: float | None = None) -> server.GetLoadResponse:
        """What runs and waits right now."""
        return self._quick(self._server.GetLoad, server.GetLoadRequest(), timeout)

    def watch_load(
        self, interval: Seconds | None = None, *, timeout: float | None = None
    ) -> Stream[server.WatchLoadResponse]:
        """The load, now and after each `interval`, of a second if it is not given."""
        return self._stream(self._server.WatchLoad, requests.watch_load(interval), timeout)

    def drain(self, *, timeout: float | None = None) -> server.DrainResponse:
        """The server takes no new work from now on."""
        return self._quick(self._server.Drain, server.DrainRequest(), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> HealthCheckResponse:
        """Whether the server (""), one of its services, or "models/NAME" serves."""
        return self._quick(self._check, HealthCheckRequest(service=service), timeout)

    def wait_until_serving(self, service: str = "", *, timeout: float | None = None) -> None:
        """Returns when it serves, as `health` tells; waits for a server that is not there yet."""
        limit = deadline(timeout, self._timeout)
        call = self._watch(
            HealthCheckRequest(service=service), timeout=limit, wait_for_ready=True, metadata=self._metadata
        )
        with Stream[HealthCheckResponse](call, self.target) as answers:
            for answer in answers:
                if answer.status == HealthCheckResponse.SERVING:
                    return
        raise ServerUnreachable(f"the server at {self.target} stopped before it served")
