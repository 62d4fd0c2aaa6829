"""Whatever a request says, it is answered, or refused by name; the server and its worker go on."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bear_grpc.v1 import inference_service_pb2 as pb
from tests.helpers.fuzz import methods, requests
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import Api

MODEL = "fuzzed"
EXAMPLES, SEED = 500, 3
LEAST_REACHED = 0.3
"""Of the requests to generate, so many must be computed."""

TIMEOUT_S = 60.0
# They would end what is fuzzed, or put another model in its place.
LEFT_OUT = {"Drain", "UnloadModel", "DeleteModel", "RegisterModel"}
UNNAMED = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]


@dataclasses.dataclass
class Outcome:
    """How calls ended, and how many of those that generate were computed."""

    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    generations: int = 0
    reached: int = 0

    @property
    def reached_share(self) -> float:
        return self.reached / max(1, self.generations)


def calls() -> st.SearchStrategy[tuple[MethodDescriptor, Message]]:
    """Any method with any request; those that generate more often than all others together."""
    base = pb.GenerateRequest(model=MODEL, prompt="the bear is", stop=pb.StopParams(max_tokens=4))
    bases: dict[str, Message] = {"Generate": base, "GenerateOnce": pb.GenerateOnceRequest(request=base)}
    made = [
        (method, requests(method.input_type, MODEL, bases.get(method.name)))
        for method in methods()
        if method.name not in LEFT_OUT
    ]
    some = {method.name: st.tuples(st.just(method), request) for method, request in made}
    generating = st.one_of(*(some.pop(name) for name in bases))
    return st.booleans().flatmap(lambda generates: generating if generates else st.one_of(*some.values()))


async def call(api: Api, method: MethodDescriptor, request: Message, outcome: Outcome) -> None:
    """One call to its end; of a stream that has none, its first message."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind: Any = api.channel.unary_stream if method.server_streaming else api.channel.unary_unary
    answer: Any = GetMessageClass(method.output_type)
    started = kind(
        path, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
    )(request, timeout=TIMEOUT_S)
    is_generation = method.name in ("Generate", "GenerateOnce")
    outcome.generations += is_generation
    try:
        if not method.server_streaming:
            await started
            outcome.reached += is_generation
        else:
            async for message in started:
                if is_generation and message.HasField("started") and message.index == 0:
                    outcome.reached += 1
                if method.name.startswith("Watch"):
                    started.cancel()
                    break
        outcome.codes["OK"] += 1
    except grpc.aio.AioRpcError as exc:
        outcome.codes[exc.code().name] += 1
        told = f"{method.name}: {exc.code().name}: {exc.details()}\n{request}"
        assert exc.code() not in UNNAMED, told
        assert exc.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, told
        assert rpc_status.from_call(exc) is not None, told  # type: ignore[arg-type]


def fuzz(folder: Path, examples: int, number: int) -> Outcome:
    """So many calls to a server of its own; raises AssertionError for one that ends badly."""
    path = write_tiny_llama(folder / "fuzzed.gguf", context_length=512)
    outcome = Outcome()
    with asyncio.Runner() as runner:

        async def start() -> RunningServer:
            server = RunningServer(folder, environ={"BEAR_OFFLINE": "true"})
            await server.__aenter__()
            await server.ready()
            await server.api.register(MODEL, path)
            await server.api.load(MODEL, max_sequences=4)
            return server

        server = runner.run(start())

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(calls())
        def check(made: tuple[MethodDescriptor, Message]) -> None:
            method, request = made
            runner.run(call(server.api, method, request, outcome))

        try:
            check()
            runner.run(server.api.idle(MODEL))
            # A worker that died is told there; one that was unloaded by a `keep_alive` of 0 is not.
            assert not server.errors(), server.errors()[:5]
        finally:
            runner.run(server.__aexit__(None, None, None))
    return outcome


def test_no_request_ends_a_worker_or_without_a_reason(tmp_path: Path) -> None:
    outcome = fuzz(tmp_path, EXAMPLES, SEED)
    assert outcome.reached_share >= LEAST_REACHED
    assert outcome.codes["INVALID_ARGUMENT"] > EXAMPLES // 20
