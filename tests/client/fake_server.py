"""A server of the contract that answers from a script: for tests of the clients and of the command line."""
# ruff: noqa: N802 -- gRPC method names

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_status import rpc_status

from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import inference_service_pb2_grpc as inference_grpc
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import model_service_pb2_grpc as models_grpc
from bear_grpc.v1 import server_service_pb2 as server
from bear_grpc.v1 import server_service_pb2_grpc as server_grpc
from bear_grpc.v1 import types_pb2 as types
from tests.client import samples
from tests.client.samples import COMPLETED, READY

WAIT_S = 10  # how long a test waits for what happens at once


class Refusal(Exception):
    """A status with the details that bear_grpc's server sends."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        reason: str | None = None,
        *,
        domain: str = "bear_grpc",
        metadata: Mapping[str, str] | None = None,
        violations: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status_pb2.Status(code=code.value[0], message=message)
        if reason is not None:
            self._add(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {}))
        if violations:
            bad_request = error_details_pb2.BadRequest()
            for field, description in violations.items():
                bad_request.field_violations.add(field=field, description=description)
            self._add(bad_request)
        if retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(round(retry_after_s * 1e9))
            self._add(error_details_pb2.RetryInfo(retry_delay=delay))

    def _add(self, detail: Message) -> None:
        self.status.details.add().Pack(detail)


class FakeServer(
    inference_grpc.InferenceServiceServicer,
    models_grpc.ModelServiceServicer,
    server_grpc.ServerServiceServicer,
):
    """Remembers the requests. `refusal` answers every call; an `endless` stream only ends by a cancel."""

    def __init__(self, address: str, credentials: grpc.ServerCredentials | None = None) -> None:
        self.requests: list[Message] = []
        self.credentials: list[str | bytes | None] = []  # of the same calls
        self.texts = ["Hel", "", "lo"]
        self.models = [samples.DEMO, samples.PLAIN]
        self.pulled = [*samples.PULLED]
        self.progress: list[types.ModelStatus] = []
        self.places: list[inference.Queued] = []
        self.refusal: Refusal | None = None
        self.endless = False
        self.in_use: set[str] = set()
        self.estimate = samples.ESTIMATE
        self.remaining: list[int] = []  # what the next calls of Drain answer
        self.prunable = [*samples.PRUNABLE]
        self.cancelled = threading.Event()
        self.watched = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        inference_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        models_grpc.add_ModelServiceServicer_to_server(self, self._server)
        server_grpc.add_ServerServiceServicer_to_server(self, self._server)
        self.health = HealthServicer()
        self.health.set("models/plain", HealthCheckResponse.NOT_SERVING)
        add_HealthServicer_to_server(self.health, self._server)
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait(WAIT_S)

    def last(self, kind: type[Any]) -> Any:
        """The latest request of this type."""
        return next(request for request in reversed(self.requests) if isinstance(request, kind))

    def _take(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.credentials.append(dict(context.invocation_metadata()).get("authorization"))
        if self.refusal is not None:
            self._refuse(self.refusal, context)

    def _refuse(self, refusal: Refusal, context: grpc.ServicerContext) -> NoReturn:
        context.abort_with_status(rpc_status.to_status(refusal.status))
        raise AssertionError("abort raises")

    def Generate(
        self, request: inference.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference.GenerateResponse]:
        self._take(request, context)
        # Here, as gRPC does not come back to a generator whose call was cancelled between two messages.
        if self.endless and not context.add_callback(self.cancelled.set):
            self.cancelled.set()
        request_id = request.request_id or "chosen-by-the-server"
        if request.output.queue_progress:
            for status in self.progress:
                yield inference.GenerateResponse(request_id=request_id, model_progress=status)
            for place in self.places:
                yield inference.GenerateResponse(request_id=request_id, queued=place)
        # The last answer goes ahead, as it may.
        indices = [*reversed(range(max(1, request.n)))]
        for index in indices:
            started = inference.Started(model=request.model, prompt_token_count=7)
            yield inference.GenerateResponse(request_id=request_id, index=index, started=started)
        texts = [*self.texts]
        for place, text in enumerate(texts):
            for index in indices:
                last = f" {index}" if len(indices) > 1 and place == len(texts) - 1 else ""
                delta = inference.Delta(text=text + last)
                yield inference.GenerateResponse(request_id=request_id, index=index, delta=delta)
        if self.endless:
            self.cancelled.wait(WAIT_S)
            return
        for index in indices:
            yield inference.GenerateResponse(request_id=request_id, index=index, completed=COMPLETED)

    def GenerateOnce(
        self, request: inference.GenerateOnceRequest, context: grpc.ServicerContext
    ) -> inference.GenerateOnceResponse:
        self._take(request, context)
        return inference.GenerateOnceResponse(choices=[inference.Choice(text="".join(self.texts))])

    def Tokenize(
        self, request: inference.TokenizeRequest, context: grpc.ServicerContext
    ) -> inference.TokenizeResponse:
        self._take(request, context)
        return inference.TokenizeResponse(token_ids=[1, 300], pieces=[b" he", b"\xc3"])

    def Detokenize(
        self, request: inference.DetokenizeRequest, context: grpc.ServicerContext
    ) -> inference.DetokenizeResponse:
        self._take(request, context)
        return inference.DetokenizeResponse(text="hello", raw=b"hello")

    def CountTokens(
        self, request: inference.CountTokensRequest, context: grpc.ServicerContext
    ) -> inference.CountTokensResponse:
        self._take(request, context)
        return inference.CountTokensResponse(token_count=7, context_length=2048)

    def ListModels(
        self, request: models.ListModelsRequest, context: grpc.ServicerContext
    ) -> models.ListModelsResponse:
        """One model a page."""
        self._take(models.ListModelsRequest.FromString(request.SerializeToString()), context)
        found = [model for model in self.models if not request.states or model.status.state in request.states]
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(found) else ""
        return models.ListModelsResponse(models=found[at : at + 1], next_page_token=more)

    def GetModel(
        self, request: models.GetModelRequest, context: grpc.ServicerContext
    ) -> models.GetModelResponse:
        self._take(request, context)
        for model in self.models:
            if request.name in (model.name, *model.aliases):
                return models.GetModelResponse(
                    model=model,
                    metadata=samples.METADATA if request.include_metadata else (),
                    tensors=samples.TENSORS if request.include_tensors else (),
                    quantization_mix=samples.MIX,
                )
        words = f"no model is named {request.name!r}"
        self._refuse(Refusal(grpc.StatusCode.NOT_FOUND, words, "MODEL_NOT_FOUND"), context)

    def GetModelStatus(
        self, request: models.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> models.GetModelStatusResponse:
        self._take(request, context)
        return models.GetModelStatusResponse(status=READY)

    def WatchModels(
        self, request: models.WatchModelsRequest, context: grpc.ServicerContext
    ) -> Iterator[models.WatchModelsResponse]:
        self._take(request, context)
        yield models.WatchModelsResponse(status=samples.LOADING)
        yield models.WatchModelsResponse(status=READY)
        self.watched.set()

    def LoadModel(
        self, request: models.LoadModelRequest, context: grpc.ServicerContext
    ) -> models.LoadModelResponse:
        self._take(request, context)
        return models.LoadModelResponse(status=READY, load_seconds=0.5)

    def UnloadModel(
        self, request: models.UnloadModelRequest, context: grpc.ServicerContext
    ) -> models.UnloadModelResponse:
        self._take(request, context)
        return models.UnloadModelResponse(status=READY, released_bytes=12 << 20)

    def RegisterModel(
        self, request: models.RegisterModelRequest, context: grpc.ServicerContext
    ) -> models.RegisterModelResponse:
        self._take(request, context)
        source = types.ModelSource(file=types.FileSource(path=request.path))
        return models.RegisterModelResponse(model=types.Model(name=request.name, source=source))

    def DeleteModel(
        self, request: models.DeleteModelRequest, context: grpc.ServicerContext
    ) -> models.DeleteModelResponse:
        self._take(request, context)
        if request.name in self.in_use:
            self._refuse(Refusal(grpc.StatusCode.FAILED_PRECONDITION, "in use", "MODEL_IN_USE"), context)
        return models.DeleteModelResponse(released_bytes=1 << 20)

    def GetServerInfo(
        self, request: server.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> server.GetServerInfoResponse:
        self._take(request, context)
        return server.GetServerInfoResponse(
            version="0.1.0",
            devices=[server.Device(name="CPU", description="a CPU", free_bytes=1 << 30, total_bytes=2 << 30)],
            limits=server.ServerLimits(max_text_bytes=1 << 20),
            core_count=2,
        )

    def PullModel(
        self, request: models.PullModelRequest, context: grpc.ServicerContext
    ) -> Iterator[models.PullModelResponse]:
        self._take(request, context)
        if self.endless and not context.add_callback(self.cancelled.set):
            self.cancelled.set()
        yield from self.pulled
        if self.endless:
            self.cancelled.wait(WAIT_S)

    def CancelPull(
        self, request: models.CancelPullRequest, context: grpc.ServicerContext
    ) -> models.CancelPullResponse:
        self._take(request, context)
        return models.CancelPullResponse(kept_bytes=312 << 20)

    def PruneModels(
        self, request: models.PruneModelsRequest, context: grpc.ServicerContext
    ) -> models.PruneModelsResponse:
        self._take(request, context)
        return models.PruneModelsResponse(files=self.prunable)

    def EstimateMemory(
        self, request: models.EstimateMemoryRequest, context: grpc.ServicerContext
    ) -> models.EstimateMemoryResponse:
        self._take(request, context)
        return self.estimate

    def GetLoad(
        self, request: server.GetLoadRequest, context: grpc.ServicerContext
    ) -> server.GetLoadResponse:
        self._take(request, context)
        return server.GetLoadResponse(load=server.ServerLoad(running_count=2))

    def WatchLoad(
        self, request: server.WatchLoadRequest, context: grpc.ServicerContext
    ) -> Iterator[server.WatchLoadResponse]:
        self._take(request, context)
        for count in range(2):
            yield server.WatchLoadResponse(load=server.ServerLoad(running_count=count))

    def Drain(self, request: server.DrainRequest, context: grpc.ServicerContext) -> server.DrainResponse:
        self._take(request, context)
        return server.DrainResponse(remaining_count=self.remaining.pop(0) if self.remaining else 0)
