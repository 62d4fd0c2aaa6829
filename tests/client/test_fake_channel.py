"""The blocking client on grpcio-testing's channel: what goes onto the wire, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
import grpc_testing
import pytest

from bear_grpc.client import CallFailed, Client
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import model_service_pb2 as models

T = TypeVar("T")
GENERATE = inference.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name["Generate"]
COUNT_TOKENS = inference.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name["CountTokens"]
LIST_MODELS = models.DESCRIPTOR.services_by_name["ModelService"].methods_by_name["ListModels"]
WAIT_S = 10


class Wire:
    def __init__(self) -> None:
        services = [
            *inference.DESCRIPTOR.services_by_name.values(),
            *models.DESCRIPTOR.services_by_name.values(),
        ]
        self.channel: Any = grpc_testing.channel(services, grpc_testing.strict_real_time())
        self.client = Client("fake", channel=self.channel)
        self._pool = ThreadPoolExecutor(1)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a blocking call beside the test, which plays the server."""
        return self._pool.submit(function)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def test_unary_sends_the_request_and_returns_the_response(wire: Wire) -> None:
    result = wire.call(lambda: wire.client.count_tokens("m", "Hello"))
    _, request, rpc = wire.channel.take_unary_unary(COUNT_TOKENS)
    rpc.terminate(inference.CountTokensResponse(token_count=3), (), grpc.StatusCode.OK, "")
    assert request == inference.CountTokensRequest(model="m", prompt="Hello")
    assert result.result(WAIT_S).token_count == 3


def test_stream_yields_each_message(wire: Wire) -> None:
    texts = wire.client.stream_text("m", "Hello", seed=0)
    _, request, rpc = wire.channel.take_unary_stream(GENERATE)
    for text in ("a", "b"):
        rpc.send_response(inference.GenerateResponse(delta=inference.Delta(text=text)))
    rpc.terminate((), grpc.StatusCode.OK, "")
    assert request.sampling.HasField("seed")
    assert list(texts) == ["a", "b"]


def test_leaving_a_stream_cancels_its_call(wire: Wire) -> None:
    events = wire.client.generate("m", "Hello")
    _, _, rpc = wire.channel.take_unary_stream(GENERATE)
    events.cancel()
    rpc.cancelled()  # blocks until it is


def test_an_error_between_pages_is_raised(wire: Wire) -> None:
    result = wire.call(lambda: list(wire.client.list_models()))
    _, _, first = wire.channel.take_unary_unary(LIST_MODELS)
    page = models.ListModelsResponse(next_page_token="2")
    first.terminate(page, (), grpc.StatusCode.OK, "")
    _, request, second = wire.channel.take_unary_unary(LIST_MODELS)
    second.terminate(None, (), grpc.StatusCode.INTERNAL, "broken")
    assert request.page_token == "2"
    with pytest.raises(CallFailed, match="broken"):
        result.result(WAIT_S)
